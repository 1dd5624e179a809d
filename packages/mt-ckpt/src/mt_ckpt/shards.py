"""Writing model.safetensors, or numbered shards and their index, from a stream of tensors."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from mt_ckpt.sources import INDEX, SINGLE
from mt_core.checkpoint.tensor_files import write_safetensors

SHARD_BYTES = 5 * 10**9
"""Largest file; also bounds the memory of a streamed write."""


def write_shards(directory: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> str:
    """Write a stream of tensors; returns the dtype that holds most of the bytes, such as "bfloat16"."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    bytes_of: dict[torch.dtype, int] = {}
    size = 0

    def flush() -> None:
        shards.append(list(pending))
        write_safetensors(_part(directory, len(shards)), pending)
        pending.clear()

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        pending[name] = tensor.detach().to("cpu").contiguous()
        size += tensor.nbytes
        bytes_of[tensor.dtype] = bytes_of.get(tensor.dtype, 0) + tensor.nbytes
    flush()
    _name_shards(directory, shards, sum(bytes_of.values()))
    return str(max(bytes_of, key=lambda dtype: bytes_of[dtype])).removeprefix("torch.")


def _part(directory: Path, number: int) -> Path:
    return directory / f"part-{number}.safetensors"


def _name_shards(directory: Path, shards: list[list[str]], total: int) -> None:
    """How many shards there are is known only at the end; then they get their names, and the index is written."""
    if len(shards) == 1:
        _part(directory, 1).rename(directory / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _part(directory, number).rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
