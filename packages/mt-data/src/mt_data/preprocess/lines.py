"""Lines of text files, plain or compressed (.gz, .zst), in chunks of bounded size."""

import gzip
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

from mt_core.errors import MtError, Problem, raise_if
from mt_data.rules import nearest_file

BLOCK_BYTES = 1 << 20
COMPRESSED_BYTES = 1 << 16
"""Less at a time, as it may hold a hundred times as much."""
CHUNK_LINES = 4096
COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive lines of a file."""

    path: str
    first: int
    """Number of the first line, from 1."""
    lines: list[bytes]
    """Without their newlines."""


def check_inputs(paths: Iterable[Path]) -> None:
    """One `MtError` for all files that do not exist."""
    raise_if(Problem(str(path), "no such file", nearest_file(path)) for path in paths if not path.is_file())


def read_chunks(path: Path) -> Iterator[Chunk]:
    """The lines of a file: a megabyte or `CHUNK_LINES` of them at a time, whichever is less."""
    number, pieces = 1, [b""]
    for block in _blocks(path):
        pieces.append(block)
        if b"\n" not in block:  # a long line is joined once
            continue
        *lines, rest = b"".join(pieces).split(b"\n")
        pieces = [rest]
        for at in range(0, len(lines), CHUNK_LINES):
            yield Chunk(str(path), number + at, lines[at : at + CHUNK_LINES])
        number += len(lines)
    if rest := b"".join(pieces):  # a last line without a newline
        yield Chunk(str(path), number, [rest])


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        if path.suffix == ".zst":
            yield from _zstandard_blocks(path)
        else:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                while block := file.read(BLOCK_BYTES):
                    yield block
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as err:
        raise MtError(str(path), f"is damaged or cut short ({err})", "download or compress it again") from err


def _zstandard_blocks(path: Path) -> Iterator[bytes]:
    """Frames one after the other; the library's own reader does not notice a file that is cut short."""
    frame = None
    with path.open("rb") as file:
        while block := file.read(COMPRESSED_BYTES):
            while block:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(block)
                block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame:
        raise EOFError("its last frame is incomplete")
