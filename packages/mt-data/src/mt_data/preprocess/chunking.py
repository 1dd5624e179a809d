"""Cutting the inputs into pieces of about a megabyte, each the work of one process for a moment.

A plain file is cut by byte offsets, and whoever gets such a range reads it itself. A compressed file can only be read
from its beginning, so this process reads it and hands the lines on, as it does with the rows of a parquet file (extra
`mt-data[parquet]`). Every piece knows the position after it: a journal that records one can go on from there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mt_data.text_io.inputs import InputFile
from mt_data.text_io.lines import read_blocks
from mt_data.text_io.texts import open_parquet, read_batches

PIECE_BYTES = 1 << 20
PIECE_FILES = 256
PIECE_ROWS = 256


@dataclass(frozen=True, slots=True)
class InputPosition:
    """Where in the list of files the next piece begins."""

    file: int = 0
    offset: int = 0
    """Bytes of a text, decompressed; rows of a parquet file."""


@dataclass(frozen=True, slots=True)
class ByteRange:
    """The lines that begin at the bytes [begin, end) of a plain file."""

    file: InputFile
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class LineBlock:
    """Whole lines of a compressed file."""

    file: InputFile
    first_line: int
    """Number of its first line, from 1."""
    data: bytes
    too_long: int = 0
    """Bytes of a single line that was over the limit and is not here."""


@dataclass(frozen=True, slots=True)
class ParquetRows:
    """Consecutive rows of a parquet file."""

    file: InputFile
    first_row: int
    """Number of the first, from 1."""
    columns: dict[str, list[Any]]
    """The values of each key."""


@dataclass(frozen=True, slots=True)
class TextFiles:
    """Small text files, each a document."""

    files: tuple[InputFile, ...]


@dataclass(frozen=True, slots=True)
class InputPiece:
    """What to read, what it is worth on the disk, and what comes after it."""

    source: ByteRange | LineBlock | ParquetRows | TextFiles
    disk_bytes: int
    after: InputPosition


@dataclass(frozen=True, slots=True)
class CuttingOptions:
    """How inputs are cut into pieces."""

    text_documents: str = "file"
    """A document of a text file: the whole `file`, or each `line`."""
    shard: tuple[int, int] = (0, 1)
    """Which part of the input, of how many: contiguous parts of about as many bytes on the disk."""
    max_line_bytes: int = 32 << 20
    keys: tuple[str, ...] = ("text",)
    """Columns to read of a parquet file."""


def count_input_bytes(files: Sequence[InputFile], cut: CuttingOptions) -> int:
    """Bytes on the disk of the files, or of this shard of them."""
    return sum(max(0, end - begin) for begin, end in _shard_bounds(files, cut))


def cut_pieces(files: Sequence[InputFile], cut: CuttingOptions, start: InputPosition) -> Iterator[InputPiece]:
    """Every piece of this shard from a position on, in order."""
    together: list[tuple[int, InputFile]] = []
    for number, (file, (begin, end)) in enumerate(zip(files, _shard_bounds(files, cut), strict=True)):
        if number < start.file or end < begin:
            continue
        offset = start.offset if number == start.file else 0
        if _is_one_document(file, cut):
            together.append((number, file))
            if sum(file.size for _, file in together) >= PIECE_BYTES or len(together) == PIECE_FILES:
                yield _join_files(together)
                together = []
            continue
        if together:
            yield _join_files(together)
            together = []
        if file.format == "parquet":
            yield from read_row_pieces(number, file, offset, cut.keys)
        elif file.compressed:
            yield from _read_block_pieces(number, file, offset, cut.max_line_bytes)
        else:
            yield from _cut_range_pieces(number, file, max(begin, offset), end)
    if together:
        yield _join_files(together)


def _shard_bounds(files: Sequence[InputFile], cut: CuttingOptions) -> Iterator[tuple[int, int]]:
    """The bytes of each file that belong to this shard; end < begin where none of it does.

    A file that cannot be cut belongs to the shard in which its first byte lies.
    """
    (shard, shards), total, position = cut.shard, sum(file.size for file in files), 0
    low, high = shard * total // shards, (shard + 1) * total // shards
    for file in files:
        first, position = position, position + file.size
        last_shard = shard == shards - 1
        if low <= first < high or (last_shard and first == total):
            cuttable = not (_is_one_document(file, cut) or file.compressed or file.format == "parquet")
            yield 0, min(file.size, high - first) if cuttable else file.size
        elif first < low < position and not (
            _is_one_document(file, cut) or file.compressed or file.format == "parquet"
        ):
            yield low - first, min(file.size, high - first)
        else:
            yield 0, -1


def _is_one_document(file: InputFile, cut: CuttingOptions) -> bool:
    return file.format == "text" and cut.text_documents == "file"


def _join_files(together: list[tuple[int, InputFile]]) -> InputPiece:
    files = tuple(file for _, file in together)
    return InputPiece(TextFiles(files), sum(file.size for file in files), InputPosition(together[-1][0] + 1))


def _cut_range_pieces(number: int, file: InputFile, begin: int, end: int) -> Iterator[InputPiece]:
    for start in range(begin, end, PIECE_BYTES):
        stop = min(start + PIECE_BYTES, end)
        yield InputPiece(
            ByteRange(file, start, stop),
            stop - start,
            InputPosition(number, stop) if stop < end else InputPosition(number + 1),
        )


def _read_block_pieces(number: int, file: InputFile, offset: int, limit: int) -> Iterator[InputPiece]:
    """Blocks cut after their last newline; a line over the limit is counted and dropped as it streams by."""
    position, line_number, pending, too_long, paid = 0, 1, [b""], 0, 0
    for block, read in read_blocks(Path(file.path)):
        position += len(block)
        if b"\n" not in block:
            pending.append(block)
            if too_long or sum(map(len, pending)) > limit:
                too_long += sum(map(len, pending))
                pending = [b""]
            continue
        head, tail = block[: (cut := block.rindex(b"\n") + 1)], block[cut:]
        data = b"".join([*pending, head])
        if too_long:
            end = data.index(b"\n") + 1
            too_long, data = too_long + end - 1, data[end:]
        after = InputPosition(number, position - len(tail))
        if after.offset > offset:  # what lies before was done by an earlier run
            yield InputPiece(LineBlock(file, line_number, data, too_long), read - paid, after)
        paid = read
        line_number += data.count(b"\n") + bool(too_long)
        pending, too_long = [tail], 0
    data = b"".join(pending)
    block = LineBlock(file, line_number, b"", too_long + len(data)) if too_long else LineBlock(file, line_number, data)
    yield InputPiece(block, file.size - paid, InputPosition(number + 1))


def read_row_pieces(number: int, file: InputFile, offset: int, keys: tuple[str, ...]) -> Iterator[InputPiece]:
    """The rows from `offset` on; each piece has its share of the file's bytes."""
    parquet = open_parquet(file.path, keys)
    rows, row = parquet.metadata.num_rows, 0
    for group in range(parquet.metadata.num_row_groups):
        if (beyond := row + parquet.metadata.row_group(group).num_rows) <= offset:
            row = beyond
            continue
        for columns in read_batches(parquet, file.path, keys, rows=PIECE_ROWS, row_groups=[group]):
            first, row = row, row + len(columns[keys[0]])
            if row > offset:
                share = file.size * row // rows - file.size * first // rows
                after = InputPosition(number, row) if row < rows else InputPosition(number + 1)
                yield InputPiece(ParquetRows(file, first + 1, columns), share, after)
