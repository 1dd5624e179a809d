"""Writes safetensors files from a stream of tensors: memory holds no more than a batch of small ones.

A file that is larger than a batch gets its header last, in room that was kept before the data and is filled with
spaces. Tensors of a batch are sorted by the width of their numbers; one that would lie unaligned begins another file.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from mt_core.checkpoint.safetensors_io import (
    Header,
    build_header,
    header_text,
    write_all,
    write_safetensors,
    write_tensors,
)

BATCH_BYTES = 1 << 20
ROOM = 128 << 10
"""For the header of a file that is streamed: about a thousand tensors; then another file begins."""


def write_stream(
    tensors: Iterable[tuple[str, Tensor]],
    get_path: Callable[[int], Path],
    *,
    limit: int,
    metadata: Callable[[Header], Mapping[str, str]] = lambda header: {},
) -> list[Header]:
    """Write tensors, one at a time from the iterable, into files of at most `limit` bytes, and flush them to the disk.

    `get_path(1)` is the first file's path, which is written in any case; `metadata` gets a file's header and gives what
    else it shall say. A tensor larger than `limit` has a file of its own. Returns each file's header.
    """
    files = _Files(get_path, limit, metadata)
    try:
        for name, tensor in tensors:
            files.add(name, tensor.detach().to("cpu").contiguous())
            del tensor  # or it would be held while the next one is made
        if files.open or files.batch or not files.headers:
            files.finish()
    finally:
        if files.open:
            files.open.out.close()
    return files.headers


class _OpenFile:
    """A file whose header is not written yet."""

    def __init__(self, path: Path) -> None:
        self.out = path.open("wb", buffering=0)
        self.out.seek(ROOM)
        self.header: Header = {}
        self.size = 0
        self.room = ROOM - 1024

    def takes(self, batch: Mapping[str, Tensor]) -> bool:
        """Whether a batch would lie aligned and the header has room for it."""
        aligned = all(self.size % tensor.itemsize == 0 for tensor in batch.values())
        return aligned and _header_room(batch) <= self.room

    def write(self, batch: Mapping[str, Tensor]) -> None:
        self.header |= build_header(batch, self.size)
        self.room -= _header_room(batch)
        write_tensors(self.out, batch)
        self.size += sum(tensor.nbytes for tensor in batch.values())

    def close(self, metadata: Mapping[str, str]) -> None:
        self.out.seek(0)
        write_all(self.out, memoryview(header_text(self.header, metadata, ROOM)))
        os.fsync(self.out.fileno())
        self.out.close()


def _header_room(batch: Mapping[str, Tensor]) -> int:
    """More bytes than the header takes for tensors, and for a list of their offsets in the metadata."""
    return sum(2 * len(json.dumps(name)) + 24 * tensor.dim() + 160 for name, tensor in batch.items())


class _Files:
    """The batch that is gathered, the file that is open, and the headers of those that are done."""

    def __init__(
        self, get_path: Callable[[int], Path], limit: int, metadata: Callable[[Header], Mapping[str, str]]
    ) -> None:
        self.get_path, self.limit, self.metadata = get_path, limit, metadata
        self.headers: list[Header] = []
        self.open: _OpenFile | None = None
        self.batch: dict[str, Tensor] = {}
        self.batch_bytes = 0

    @property
    def _path(self) -> Path:
        return self.get_path(len(self.headers) + 1)

    def add(self, name: str, tensor: Tensor) -> None:
        size = self.batch_bytes + (self.open.size if self.open else 0)
        if size and size + tensor.nbytes > self.limit:
            self.finish()
        self.batch[name] = tensor
        self.batch_bytes += tensor.nbytes
        if self.batch_bytes >= BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self.open and not self.open.takes(self.batch):
            self._close()
        self.open = self.open or _OpenFile(self._path)
        self.open.write(self.batch)
        self.batch, self.batch_bytes = {}, 0

    def _close(self) -> None:
        assert self.open, "there is a file"
        self.open.close(self.metadata(self.open.header))
        self.headers.append(self.open.header)
        self.open = None

    def finish(self) -> None:
        """Write the batch and close the file; one that fits a batch gets no more room than its header takes."""
        if self.open and self.batch:
            self._flush()
        if self.open:
            return self._close()
        header = build_header(self.batch)
        write_safetensors(self._path, self.batch, self.metadata(header))
        self.headers.append(header)
        self.batch, self.batch_bytes = {}, 0
