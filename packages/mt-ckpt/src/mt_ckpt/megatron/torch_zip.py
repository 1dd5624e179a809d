"""The zip archive that a file of torch.save is: records as they are, aligned, written piece by piece.

Not torch's own writer: that one wants each record whole, in memory of its own.
"""

import struct
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any
from zipfile import ZipFile, ZipInfo

import torch
from torch import Tensor

ALIGNMENT, BLOCK_BYTES = 64, 8 << 20
BLOCKS_WAITING = 16
LARGE = 1 << 30
"""Records from this size on have fields of 64 bits for it."""
ZIP64_FIELD, HEADER = 20, 30


class TorchZip:
    """Appends an archive to a file, whatever is in the file before."""

    def __init__(self, file: IO[bytes]) -> None:
        self.window = _Window(file)
        self.zip = ZipFile(self.window, "w")  # pyright: ignore[reportArgumentType]

    def write(self, name: str, record: bytes | Tensor) -> None:
        """Add a record; of a tensor, its numbers, row after row."""
        large = not isinstance(record, bytes) and record.nbytes >= LARGE
        info = ZipInfo(f"archive/{name}")
        start = self.window.tell() + HEADER + len(info.filename) + (ZIP64_FIELD if large else 0) + 4
        padding = -start % ALIGNMENT
        info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        with self.zip.open(info, "w", force_zip64=large) as out:
            for piece in [record] if isinstance(record, bytes) else pieces(record):
                out.write(piece)

    def close(self) -> None:
        """Write the table of contents."""
        self.write("version", b"3\n")
        self.zip.close()
        self.window.close()


def pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a CPU tensor in order, a few megabytes at a time; no more than those are copied."""
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
    """A file from its present position on; a thread writes while the caller reads what comes next."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.start = file, file.tell()
        self.thread = ThreadPoolExecutor(1)
        self.waiting: deque[Future[int]] = deque()
        self.position = 0

    def tell(self) -> int:
        return self.position

    def seek(self, position: int, whence: int = 0) -> int:
        self.flush()
        self.position = self.file.seek(position + (0 if whence else self.start), whence) - self.start
        return self.position

    def write(self, data: Any) -> int:
        self.waiting.append(self.thread.submit(self.file.write, data))
        while len(self.waiting) > BLOCKS_WAITING:
            self.waiting.popleft().result()
        self.position += len(data)
        return len(data)

    def flush(self) -> None:
        while self.waiting:
            self.waiting.popleft().result()
        self.file.flush()

    def close(self) -> None:
        self.flush()
        self.thread.shutdown()
