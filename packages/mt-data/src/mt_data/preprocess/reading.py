"""A piece to the documents in it: what a worker process does before it tokenizes."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from mt_core.errors import Problem
from mt_core.files import open_to_read
from mt_data.preprocess.chunking import ByteRange, CuttingOptions, LineBlock, ParquetRows, TextFiles
from mt_data.text_io.inputs import InputFile
from mt_data.text_io.json_documents import BadLine, TextValue, check_value, decode_utf8, parse_values
from mt_data.text_io.lines import read_blocks

SEARCH_BYTES = 1 << 20
LINE_FORM = "one JSON object a line"


@dataclass(slots=True)
class ParsedDocuments:
    """Documents of a piece, and what is wrong with the rest of it."""

    values: list[tuple[TextValue, ...]] = field(default_factory=list)
    """Value of each key, for each document."""
    problems: list[Problem] = field(default_factory=list)
    """One for each line, row or file that is not a document."""
    bytes: int = 0
    """Size of the text, decompressed."""


def read_documents(source: ByteRange | LineBlock | ParquetRows | TextFiles, cut: CuttingOptions) -> ParsedDocuments:
    """Read what a piece names, or take what it brings."""
    match source:
        case ByteRange():
            return _parse_range(source, cut)
        case LineBlock():
            return _parse_block(source, cut)
        case ParquetRows():
            return _parse_rows(source, cut.keys)
        case TextFiles():
            return _read_files(source.files, cut)


def _parse_range(source: ByteRange, cut: CuttingOptions) -> ParsedDocuments:
    documents, before = ParsedDocuments(), None
    for number, (line, size) in enumerate(_read_lines(source, cut.max_line_bytes), start=1):
        try:
            _add_line(line, size, source.file, cut, documents)
        except BadLine as err:
            if before is None:
                before = _count_lines_before(source)
            documents.problems.append(Problem(f"{source.file.path}:{before + number}", str(err), LINE_FORM))
    return documents


def _parse_block(source: LineBlock, cut: CuttingOptions) -> ParsedDocuments:
    documents = ParsedDocuments()
    lines: list[tuple[bytes | None, int]] = [(None, source.too_long)] if source.too_long else []
    *whole, rest = source.data.split(b"\n")
    lines += [(line, len(line) + 1) for line in whole]
    if rest:
        lines.append((rest, len(rest)))
    for number, (line, size) in enumerate(lines, start=source.first_line):
        try:
            _add_line(line, size, source.file, cut, documents)
        except BadLine as err:
            documents.problems.append(Problem(f"{source.file.path}:{number}", str(err), LINE_FORM))
    return documents


def _add_line(line: bytes | None, size: int, file: InputFile, cut: CuttingOptions, documents: ParsedDocuments) -> None:
    """Add the document of a line; None stands for one that was too long to keep."""
    documents.bytes += size
    if line is None or len(line) > cut.max_line_bytes:
        limit = f"{cut.max_line_bytes / 2**20:g} MiB"
        raise BadLine(f"has {size / 2**20:.1f} MiB, more than the {limit} of --max-line-mb")
    documents.values.append((decode_utf8(line),) if file.format == "text" else parse_values(line, cut.keys))


def _read_lines(source: ByteRange, limit: int) -> Iterator[tuple[bytes | None, int]]:
    """Lines that begin in the range, and their sizes; of one over the limit only the size, in bounded memory."""
    with open_to_read(Path(source.file.path)) as file:
        position = source.begin
        if position:  # the line that reaches into the range belongs to the one before
            file.seek(position - 1)
            position = position - 1 + _skip_line(file, source.end - position + 1)
        while position < source.end and (line := file.readline(limit + 2)):
            size = len(line)
            if not line.endswith(b"\n") and size > limit:
                size += _skip_line(file, None)
                yield None, size
            else:
                yield line.removesuffix(b"\n"), size
            position += size


def _skip_line(file: IO[bytes], most: int | None) -> int:
    """Read up to and with the next newline, or `most` bytes; how many they were."""
    skipped = 0
    while most is None or skipped < most:
        part = file.readline(SEARCH_BYTES)
        skipped += len(part)
        if not part or part.endswith(b"\n"):
            break
    return skipped


def _count_lines_before(source: ByteRange) -> int:
    """Lines that begin before the first one of a range: counted only when there is something to say about it."""
    lines, left = 0, source.begin
    with open_to_read(Path(source.file.path)) as file:
        while left and (block := file.read(min(left, SEARCH_BYTES))):
            lines, left = lines + block.count(b"\n"), left - len(block)
        if source.begin:
            file.seek(source.begin - 1)
            lines += file.read(1) != b"\n"
    return lines


def _parse_rows(source: ParquetRows, keys: tuple[str, ...]) -> ParsedDocuments:
    documents = ParsedDocuments()
    for number, row in enumerate(zip(*(source.columns[key] for key in keys), strict=True), start=source.first_row):
        try:
            values = tuple(check_value(value, key) for value, key in zip(row, keys, strict=True))
        except BadLine as err:
            documents.problems.append(Problem(f"{source.file.path}: row {number}", str(err), "a text in every row"))
            continue
        documents.values.append(values)
        documents.bytes += sum(len(text.encode()) for value in values for text in _list_texts(value))
    return documents


def _list_texts(value: TextValue) -> list[str]:
    return value if isinstance(value, list) else [value]


def _read_files(files: tuple[InputFile, ...], cut: CuttingOptions) -> ParsedDocuments:
    documents = ParsedDocuments()
    for file in files:
        data, size = [], 0
        for block, _ in read_blocks(Path(file.path)):
            size += len(block)
            if size <= cut.max_line_bytes:
                data.append(block)
        try:
            if size > cut.max_line_bytes:
                limit = f"{cut.max_line_bytes / 2**20:g} MiB"
                raise BadLine(f"has {size / 2**20:.1f} MiB, more than the {limit} of --max-line-mb")
            documents.values.append((decode_utf8(b"".join(data)),))
        except BadLine as err:
            hint = "UTF-8 text; --text-documents line makes every line a document"
            documents.problems.append(Problem(file.path, str(err), hint))
        documents.bytes += size
    return documents
