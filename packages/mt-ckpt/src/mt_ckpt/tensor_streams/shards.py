"""Writing model.safetensors, or numbered shards and their index, from a stream of tensors."""

import json
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from mt_ckpt.tensor_streams.sources import INDEX, SINGLE
from mt_core.checkpoint.safetensors_io import DTYPES
from mt_core.checkpoint.streaming import write_stream


def write_shards(directory: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> str:
    """Write a stream of tensors; returns the dtype that holds most of the bytes, such as "bfloat16"."""
    headers = write_stream(tensors, lambda number: _part(directory, number), limit=shard_bytes)
    dtype_bytes: dict[str, int] = {}
    for entry in (entry for header in headers for entry in header.values()):
        start, end = entry["data_offsets"]
        dtype_bytes[entry["dtype"]] = dtype_bytes.get(entry["dtype"], 0) + end - start
    _name_shards(directory, [list(header) for header in headers], sum(dtype_bytes.values()))
    return str(DTYPES[max(dtype_bytes, key=lambda dtype: dtype_bytes[dtype])]).removeprefix("torch.")


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
