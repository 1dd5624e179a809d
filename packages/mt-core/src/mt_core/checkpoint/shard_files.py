"""One part (`model` or `optim`) of a checkpoint: a directory of safetensors files that PyTorch's DCP can read.

Every file holds whole tensors. Its header carries DCP's sharding record, so `torch.distributed.checkpoint` reshards it
on load, while every safetensors reader sees plain tensors. Nothing is pickled.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mt_core.checkpoint.page_cache import drop_pages
from mt_core.checkpoint.safetensors_io import DTYPES, Header, open_safetensors
from mt_core.checkpoint.streaming import write_stream
from mt_core.errors import MtError

SHARD_BYTES = 2 << 30
"""The next file begins before one exceeds this size."""


def write_part(directory: Path, tensors: Iterable[tuple[str, Tensor]], prefix: str = "shard") -> list[str]:
    """Write tensors, one at a time from the iterable, into files `PREFIX-00001.safetensors` and on; returns the names.

    There is always one file at least. Each is on the disk when this returns, its directory entry not yet.
    """
    directory.mkdir(parents=True, exist_ok=True)
    headers = write_stream(
        tensors,
        lambda number: directory / f"{prefix}-{number:05d}.safetensors",
        limit=SHARD_BYTES,
        metadata=_sharding_record,
    )
    return [name for header in headers for name in header]


def _sharding_record(header: Header) -> dict[str, str]:
    record = {name: {"saved_offsets": [0] * len(entry["shape"])} for name, entry in header.items()}
    return {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(record)}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that is still in its file: slicing it gives a view of mapped memory, read from disk when used."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    _opened: Any

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, box: Any) -> Tensor:
        """The part of the tensor inside `box`: slices or numbers, one for each dim or fewer; `...` is all of it."""
        return self._opened.get_slice(self.name)[box]


def open_part(directory: Path) -> dict[str, StoredTensor]:
    """Canonical name → lazy tensor, over all files of a part. Only headers are read."""
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        opened = open_safetensors(file)
        for name in opened.keys():  # noqa: SIM118 (it is no mapping)
            if name in tensors:
                raise MtError(str(file), f"{name} is also in {tensors[name].file.name}", "keep one of the two files")
            header = opened.get_slice(name)
            dtype = DTYPES[header.get_dtype()]
            tensors[name] = StoredTensor(name, tuple(header.get_shape()), dtype, file, opened)
    return tensors


def stream_part(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors, one at a time, memory-mapped; each leaves memory when the next one is asked for."""
    used: dict[Path, list[Tensor]] = {}
    for name, stored in open_part(directory).items():
        tensor = stored[...]
        yield name, tensor
        used.setdefault(stored.file, []).append(tensor)
        drop_pages(*used[stored.file])


def check_names(directory: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, StoredTensor]:
    """The opened part; refuses, naming everything at once, files whose tensors are not exactly the expected ones."""
    tensors = open_part(directory)
    wrong = [f"{name} missing" for name in expected if name not in tensors]
    wrong += [f"{name} unexpected" for name in tensors if name not in expected]
    wrong += [
        f"{name} has shape {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != tuple(shape)
    ]
    if wrong:
        raise MtError(str(directory), f"does not fit this model: {'; '.join(wrong)}", "use the run's own configuration")
    return tensors
