"""The zip archive that a file of torch.save is: records as they are, aligned, written piece by piece.

Not torch's own writer: that one wants each record whole, in memory of its own.
"""

import struct
from collections.abc import Iterable, Iterator
from typing import IO
from zipfile import ZipFile, ZipInfo

import torch
from torch import Tensor

from mt_core.checkpoint.safetensors_io import write_all

RECORD_ALIGNMENT = 64
BLOCK_BYTES = 128 << 10
"""What is summed up and then written while it is in the processor's cache: reading memory twice costs several times as
much as all the rest (docs/benchmarks.md)."""
LARGE = 1 << 30
"""Records from this size on have fields of 64 bits for it."""
ZIP64_FIELD, HEADER = 20, 30


class TorchZip:
    """Appends an archive to a file, whatever is in the file before."""

    def __init__(self, file: IO[bytes]) -> None:
        """`file` is unbuffered, and at its end."""
        self.start, self.window = file.tell(), _Window(file)
        self.zip = ZipFile(self.window, "w")  # pyright: ignore[reportCallIssue, reportArgumentType]

    def write(self, name: str, record: bytes) -> None:
        """Add a record."""
        self._write(name, len(record), [record])

    def write_tensor(self, name: str, blocks: Iterable[Tensor]) -> None:
        """Add a record of a tensor's numbers, row after row; `blocks` are CPU tensors of some of its rows each."""
        blocks = [*blocks]
        self._write(name, sum(block.nbytes for block in blocks), (piece for block in blocks for piece in pieces(block)))

    def _write(self, name: str, size: int, data: Iterable[bytes | memoryview]) -> None:
        info, large = ZipInfo(f"archive/{name}"), size >= LARGE
        start = self.window.tell() + HEADER + len(info.filename) + (ZIP64_FIELD if large else 0) + 4
        padding = -start % RECORD_ALIGNMENT
        info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        with self.zip.open(info, "w", force_zip64=large) as out:
            for piece in data:
                out.write(piece)

    def close(self) -> int:
        """Write the table of contents; returns the bytes of the archive."""
        self.write("version", b"3\n")
        self.zip.close()
        return self.window.tell()


def pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a CPU tensor in order, some rows at a time; no more than those are copied."""
    if tensor.is_contiguous():
        data = tensor.view(-1).view(torch.uint8).numpy().data
        yield from (data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES))
        return
    a_row = tensor.nbytes // len(tensor)
    if a_row > BLOCK_BYTES:
        for row in tensor:
            yield from pieces(row)
        return
    for block in tensor.split(max(1, BLOCK_BYTES // a_row)):
        yield block.contiguous().view(-1).view(torch.uint8).numpy().data


class _Window:
    """A file from its present position on, as if it began there; after a write that failed, it takes no more.

    ZipFile would else try to end the archive when it is collected, and print a traceback that nobody can catch.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.start, self.failed = file, file.tell(), False

    def tell(self) -> int:
        return self.file.tell() - self.start

    def seek(self, position: int) -> int:
        return self.file.seek(self.start + position) - self.start

    def write(self, data: bytes | memoryview) -> int:
        if not self.failed:
            self.failed = True
            write_all(self.file, memoryview(data))
            self.failed = False
        return len(data)

    def flush(self) -> None:
        """Nothing waits: the file is unbuffered."""
