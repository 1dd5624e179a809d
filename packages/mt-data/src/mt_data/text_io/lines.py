"""Bytes and lines of text files, plain or compressed (.gz, .zst, .bz2), in blocks of bounded size."""

import bz2
import gzip
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import zstandard

from mt_core.errors import MtError, Problem, raise_if, suggest_file
from mt_core.files import open_to_read
from mt_data.text_io.inputs import COMPRESSED

__all__ = ["COMPRESSED", "LineChunk", "check_inputs", "read_blocks", "read_chunks"]

BLOCK_BYTES = 1 << 20
COMPRESSED_BYTES = 1 << 16
"""Less at a time, as it may hold a hundred times as much."""
CHUNK_LINES = 4096


@dataclass(frozen=True, slots=True)
class LineChunk:
    """Consecutive lines of a file."""

    path: str
    first: int
    """Number of the first line, from 1."""
    lines: list[bytes]
    """Without their newlines."""


def check_inputs(paths: Iterable[Path]) -> None:
    """One `MtError` for all files that do not exist."""
    raise_if(Problem(str(path), "no such file", suggest_file(path)) for path in paths if not path.is_file())


def read_chunks(path: Path) -> Iterator[LineChunk]:
    """The lines of a file: a megabyte or `CHUNK_LINES` of them at a time, whichever is less."""
    number, pieces = 1, [b""]
    for block, _ in read_blocks(path):
        pieces.append(block)
        if b"\n" not in block:  # a long line is joined once
            continue
        *lines, rest = b"".join(pieces).split(b"\n")
        pieces = [rest]
        for first in range(0, len(lines), CHUNK_LINES):
            yield LineChunk(str(path), number + first, lines[first : first + CHUNK_LINES])
        number += len(lines)
    if rest := b"".join(pieces):  # a last line without a newline
        yield LineChunk(str(path), number, [rest])


def read_blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    """The bytes of a file, decompressed, with the bytes of the file itself that were read so far."""
    with open_to_read(path) as raw, name_damaged_file(path):
        if path.suffix == ".zst":
            yield from _read_zstandard(raw)
        else:
            with {".gz": gzip.open, ".bz2": bz2.open}.get(path.suffix, nullcontext)(raw) as file:
                while block := file.read(BLOCK_BYTES):
                    yield block, raw.tell()


@contextmanager
def name_damaged_file(path: Path) -> Iterator[None]:
    """Turn what the compression libraries raise into an `MtError` that names the file."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as err:
        raise _damage_error(path, err) from err
    except OSError as err:  # bz2 has no error of its own: "Invalid data stream"
        if err.errno is None:
            raise _damage_error(path, err) from err
        raise MtError(str(path), f"cannot be read ({err.strerror})", "check the disk that it is on") from err


def _damage_error(path: Path, err: Exception) -> MtError:
    return MtError(str(path), f"is damaged or cut short ({err})", "download or compress it again")


def _read_zstandard(file: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """Frames one after the other; the library's own reader does not notice a file that is cut short."""
    frame = None
    while block := file.read(COMPRESSED_BYTES):
        while block:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(block), file.tell()
            block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame:
        raise EOFError("its last frame is incomplete")
