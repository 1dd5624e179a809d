"""Megatron's `torch_dist` format, written by the recipe that every release since 0.11 reads (§2.7)."""

import io
import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mt_ckpt.megatron.arguments import write_args
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.names import EMBED, LAYER, LINEARS, Parameter, engine_name, shard
from mt_ckpt.megatron.rank_files import VERSION
from mt_models.config import GPTConfig

CHUNKS, PROTOCOL = "__0_0.distcp", 4
MARK = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""metadata.json, whose presence says that all is written."""


def write_dist(
    directory: Path, config: GPTConfig, tensors: Iterable[tuple[str, Parameter, Tensor]], layout: Layout
) -> None:
    """Write each tensor as it comes: a chunk for each layer, under keys without the layer's number."""
    directory.mkdir(parents=True)
    known: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    dtype = torch.float32
    with (directory / CHUNKS).open("wb") as file:
        for name, one, whole in tensors:
            dtype = whole.dtype if name == EMBED else dtype
            key, at, size, stored = _placed(config, name, shard(whole, one, 0, 1))
            known.setdefault(key, TensorStorageMetadata(TensorProperties(dtype=stored.dtype), torch.Size(size), []))
            known[key].chunks.append(ChunkStorageMetadata(torch.Size(at), stored.shape))
            places[MetadataIndex(key, torch.Size(at))] = _append(file, stored.detach().clone())
        for module in LINEARS:
            for n in range(config.layers):
                key = f"decoder.layers.{module}._extra_state/shard_{n}_{config.layers}"
                known[key], places[MetadataIndex(key)] = BytesStorageMetadata(), _append(file, [None])
    args = write_args(config, layout, dtype=dtype, form="torch_dist")
    common = {"args": args, "checkpoint_version": VERSION, "iteration": 0, "num_floating_point_operations_so_far": 0}
    torch.save(common, directory / "common.pt")
    (directory / ".metadata").write_bytes(pickle.dumps(Metadata(known, None, places), PROTOCOL))
    (directory / "metadata.json").write_text(json.dumps(MARK))


def _placed(config: GPTConfig, name: str, stored: Tensor) -> tuple[str, list[int], list[int], Tensor]:
    """Key, where the tensor starts in it, the key's whole size, and the chunk to write."""
    if not (number := LAYER.match(name)):
        return name, [0] * stored.dim(), [*stored.shape], stored
    key = LAYER.sub("decoder.layers.", engine_name(name))
    return key, [int(number[1]), *[0] * stored.dim()], [config.layers, *stored.shape], stored[None]


def _append(file: IO[bytes], value: Any) -> _StorageInfo:
    """Write a record: a whole file of torch.save."""
    content, start = io.BytesIO(), file.tell()
    torch.save(value, content)
    return _StorageInfo(CHUNKS, start, file.write(content.getbuffer()))
