"""Cutting the inputs into pieces of about a megabyte.

A plain file is cut by byte offsets. A compressed file can only be read from its beginning, so this process reads it and
hands the lines on. Every piece knows the position after it: a journal that holds one can go on from there.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from mt_data.text_io.inputs import InputFile
from mt_data.text_io.lines import read_blocks
from mt_data.preprocess.parquet import row_pieces
from mt_data.preprocess.pieces import Block, Cut, Files, Piece, Position, Range

PIECE_BYTES = 1 << 20
PIECE_FILES = 256


def input_bytes(files: Sequence[InputFile], cut: Cut) -> int:
    """Bytes on the disk of the files, or of this shard of them."""
    return sum(max(0, end - begin) for begin, end in _owned(files, cut))


def cut_pieces(files: Sequence[InputFile], cut: Cut, start: Position) -> Iterator[Piece]:
    """Every piece of this shard from a position on, in order."""
    together: list[tuple[int, InputFile]] = []
    for number, (file, (begin, end)) in enumerate(zip(files, _owned(files, cut), strict=True)):
        if number < start.file or end < begin:
            continue
        offset = start.offset if number == start.file else 0
        if _whole(file, cut):
            together.append((number, file))
            if sum(file.size for _, file in together) >= PIECE_BYTES or len(together) == PIECE_FILES:
                yield _files(together)
                together = []
            continue
        if together:
            yield _files(together)
            together = []
        if file.format == "parquet":
            yield from row_pieces(number, file, offset, cut.keys)
        elif file.compressed:
            yield from _block_pieces(number, file, offset, cut.max_line_bytes)
        else:
            yield from _range_pieces(number, file, max(begin, offset), end)
    if together:
        yield _files(together)


def _owned(files: Sequence[InputFile], cut: Cut) -> Iterator[tuple[int, int]]:
    """The bytes of each file that belong to this shard; end < begin where none of it does.

    A file that cannot be cut belongs to the shard in which its first byte lies.
    """
    (shard, shards), total, at = cut.shard, sum(file.size for file in files), 0
    low, high = shard * total // shards, (shard + 1) * total // shards
    for file in files:
        first, at = at, at + file.size
        last_shard = shard == shards - 1
        if low <= first < high or (last_shard and first == total):
            cuttable = not (_whole(file, cut) or file.compressed or file.format == "parquet")
            yield 0, min(file.size, high - first) if cuttable else file.size
        elif first < low < at and not (_whole(file, cut) or file.compressed or file.format == "parquet"):
            yield low - first, min(file.size, high - first)
        else:
            yield 0, -1


def _whole(file: InputFile, cut: Cut) -> bool:
    return file.format == "text" and cut.text_documents == "file"


def _files(together: list[tuple[int, InputFile]]) -> Piece:
    files = tuple(file for _, file in together)
    return Piece(Files(files), sum(file.size for file in files), Position(together[-1][0] + 1))


def _range_pieces(number: int, file: InputFile, begin: int, end: int) -> Iterator[Piece]:
    for at in range(begin, end, PIECE_BYTES):
        stop = min(at + PIECE_BYTES, end)
        yield Piece(Range(file, at, stop), stop - at, Position(number, stop) if stop < end else Position(number + 1))


def _block_pieces(number: int, file: InputFile, offset: int, limit: int) -> Iterator[Piece]:
    """Blocks cut after their last newline; a line over the limit is counted and dropped as it streams by."""
    at, line, held, too_long, paid = 0, 1, [b""], 0, 0
    for block, read in read_blocks(Path(file.path)):
        at += len(block)
        if b"\n" not in block:
            held.append(block)
            if too_long or sum(map(len, held)) > limit:
                too_long += sum(map(len, held))
                held = [b""]
            continue
        head, tail = block[: (cut := block.rindex(b"\n") + 1)], block[cut:]
        data = b"".join([*held, head])
        if too_long:
            end = data.index(b"\n") + 1
            too_long, data = too_long + end - 1, data[end:]
        after = Position(number, at - len(tail))
        if after.offset > offset:  # what lies before was done by an earlier run
            yield Piece(Block(file, line, data, too_long), read - paid, after)
        paid = read
        line += data.count(b"\n") + bool(too_long)
        held, too_long = [tail], 0
    data = b"".join(held)
    block = Block(file, line, b"", too_long + len(data)) if too_long else Block(file, line, data)
    yield Piece(block, file.size - paid, Position(number + 1))
