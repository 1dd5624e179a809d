"""Megatron's `torch_dist` format, written by the recipe that every release since 0.11 reads (§2.7)."""

import json
import pickle
from collections.abc import Iterable, Iterator
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

from mt_ckpt.megatron.dist_boxes import Place
from mt_ckpt.megatron.fusing import shard
from mt_ckpt.megatron.kinds import model_args
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.names import (
    EMBED,
    EXPERT,
    LAYER,
    copies_of,
    engine_name,
    layers_of,
    parameters,
    unnumbered,
)
from mt_ckpt.megatron.rank_files import HEAD_STATE, VERSION
from mt_ckpt.megatron.rank_files import extra_states as of_modules
from mt_ckpt.megatron.tables import Parameter
from mt_ckpt.megatron.torch_writer import TorchWriter
from mt_models.config import TransformerConfig

CHUNKS, PROTOCOL = "__0_0.distcp", 4
MARK = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""metadata.json, whose presence says that all is written."""


def write_dist(
    directory: Path,
    config: TransformerConfig,
    tensors: Iterable[tuple[str, Parameter, Tensor]],
    layout: Layout,
    *,
    iteration: int = 0,
) -> None:
    """Write each tensor as it comes: a chunk for each layer, under keys without the layer's number."""
    directory.mkdir(parents=True)
    known: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    dtype = torch.float32
    with (directory / CHUNKS).open("wb") as file:
        for name, one, whole in tensors:
            dtype = whole.dtype if name == EMBED else dtype
            stored = shard(whole, one, 0, 1)
            for own_name in (name, *copies_of(config, name)):
                key, index, counts = written_place(config, own_name, engine=layout.engine)
                at, size = torch.Size([*index, *[0] * stored.dim()]), torch.Size([*counts, *stored.shape])
                known.setdefault(key, TensorStorageMetadata(TensorProperties(dtype=stored.dtype), size, []))
                chunk = stored.detach()[(None,) * len(index)]
                known[key].chunks.append(ChunkStorageMetadata(at, chunk.shape))
                places[MetadataIndex(key, at)] = _append(file, chunk)
        for key in extra_states(config, engine=layout.engine):
            known[key], places[MetadataIndex(key)] = BytesStorageMetadata(), _append(file, [None])
    args = model_args(config, layout, dtype=dtype, form="torch_dist")
    common = {"args": args, "checkpoint_version": VERSION, "iteration": iteration}
    torch.save({**common, "num_floating_point_operations_so_far": 0}, directory / "common.pt")
    (directory / ".metadata").write_bytes(pickle.dumps(Metadata(known, None, places), PROTOCOL))
    (directory / "metadata.json").write_text(json.dumps(MARK))


def written_place(config: TransformerConfig, name: str, *, engine: bool) -> Place:
    """Where a tensor goes. Names are Transformer Engine's in any case, but for the norm before experts, where its
    layers and Megatron's own differ."""
    layer, expert = LAYER.match(name), EXPERT.search(name)
    if layer is None:
        return Place(name)
    index, counts = (int(layer[1]),), (layers_of(config, name),)
    if expert and config.mlp.kind == "moe":
        index, counts = (*index, int(expert[1])), (*counts, config.mlp.experts)
    key = EXPERT.sub("mlp.experts.experts.", unnumbered(name))
    return Place(engine_name(key, experts=engine and config.mlp.kind == "moe"), index, counts)


def extra_states(config: TransformerConfig, *, engine: bool) -> Iterator[str]:
    """Keys of the linear layers' extra states, of which there is one for each layer and expert."""
    names = of_modules(parameters(config), Layout(1, 1, 1, engine=engine))
    heads = () if config.kind == "gpt" else (HEAD_STATE, *copies_of(config, HEAD_STATE))
    for name in (*names, *heads):
        key, at, counts = written_place(config, name, engine=engine)
        yield f"{key}/shard_{_dotted(at or (0,))}_{_dotted(counts or (1,))}"


def _dotted(numbers: Iterable[int]) -> str:
    return ".".join(map(str, numbers))


def _append(file: IO[bytes], value: Any) -> _StorageInfo:
    """Write a record: a whole file of torch.save."""
    start, writer = file.tell(), TorchWriter(file)
    writer.close(writer.add(value) if isinstance(value, Tensor) else value)
    return _StorageInfo(CHUNKS, start, file.tell() - start)
