"""Pieces of the input, each the work of one process for a moment, and the position after each.

A piece of a plain file is a range of bytes, which whoever gets it reads itself; all others bring what is in them, or
name whole files.
"""

from dataclasses import dataclass
from typing import Any

from mt_data.text_io.inputs import InputFile


@dataclass(frozen=True, slots=True)
class Position:
    """Where in the list of files the next piece begins."""

    file: int = 0
    offset: int = 0
    """Bytes of a text, decompressed; rows of a parquet file."""


@dataclass(frozen=True, slots=True)
class Range:
    """The lines that begin at the bytes [begin, end) of a plain file."""

    file: InputFile
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Block:
    """Whole lines of a compressed file."""

    file: InputFile
    first_line: int
    """Number of its first line, from 1."""
    data: bytes
    too_long: int = 0
    """Bytes of a single line that was over the limit and is not here."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of a parquet file."""

    file: InputFile
    first_row: int
    """Number of the first, from 1."""
    columns: dict[str, list[Any]]
    """The values of each key."""


@dataclass(frozen=True, slots=True)
class Files:
    """Small text files, each a document."""

    files: tuple[InputFile, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """What to read, what it is worth on the disk, and what comes after it."""

    source: Range | Block | Rows | Files
    disk_bytes: int
    after: Position


@dataclass(frozen=True, slots=True)
class Cut:
    """How inputs are cut into pieces."""

    text_documents: str = "file"
    """A document of a text file: the whole `file`, or each `line`."""
    shard: tuple[int, int] = (0, 1)
    """Which part of the input, of how many: contiguous parts of about as many bytes on the disk."""
    max_line_bytes: int = 32 << 20
    keys: tuple[str, ...] = ("text",)
    """Columns to read of a parquet file."""
