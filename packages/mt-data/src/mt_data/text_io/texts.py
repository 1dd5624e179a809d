"""The text, the lines or the documents of one file at once, for commands that hold them in memory.

A name says what a file is (`guess_format`), compression is seen through, and a line ends at `\\n` or `\\r\\n` only:
U+2028, U+0085 and form feeds stand inside of texts.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mt_core.errors import MtError, Problem, raise_if
from mt_core.plugins import import_library
from mt_data.text_io.inputs import Format, guess_format
from mt_data.text_io.json_documents import BadLine, check_value, decode_utf8, parse_line
from mt_data.text_io.lines import check_inputs, read_blocks, read_chunks

if TYPE_CHECKING:
    from pyarrow import Array, Scalar
    from pyarrow.parquet import ParquetFile


def read_text(path: Path) -> str:
    """A whole UTF-8 file, line ends kept as they are."""
    check_file(path)
    try:
        return decode_utf8(b"".join(block for block, _ in read_blocks(path)))
    except BadLine as err:
        raise MtError(str(path), str(err), "UTF-8 text") from None


def read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 file without their ends."""
    lines = read_text(path).split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def read_documents(path: Path, key: str = "text", *, format: Format | None = None) -> Iterator[tuple[str, str]]:
    """Where it stands and the text of every document: those under `key`, or a text file as a whole.

    Without `format` the name says what the file is, text if it says nothing. Blank lines are left out. All that is
    wrong with up to 4,096 lines or rows is one `MtError`.
    """
    check_file(path)
    match format or guess_format(path) or "text":
        case "text":
            yield str(path), read_text(path)
        case "jsonl":
            yield from _read_json_lines(path, key)
        case "parquet":
            yield from _read_rows(path, key)


def check_file(path: Path) -> None:
    """Refuse what is no file, or cannot be read."""
    if path.is_dir():
        raise MtError(str(path), "is a directory", "the path of a file")
    check_inputs([path])
    if not os.access(path, os.R_OK):
        raise MtError(str(path), "cannot be read (Permission denied)", "check its permissions")


def open_parquet(path: str, keys: tuple[str, ...], *, allowed: str = "--json-keys names columns of it") -> Any:
    """A `pyarrow.parquet.ParquetFile` with the keys; an `MtError` says what to install, or what is wrong with it."""
    parquet_library = import_library("pyarrow.parquet", where=path, requires=["mt-data[parquet]"])
    from pyarrow import ArrowException

    try:
        parquet = parquet_library.ParquetFile(path)
    except (ArrowException, OSError) as err:
        raise MtError(path, f"is not a readable parquet file ({' '.join(str(err).split())})", "write it again") from err
    if missing := set(keys) - set(parquet.schema_arrow.names):
        names = ", ".join(map(repr, parquet.schema_arrow.names))
        raise MtError(path, f"has no column {min(missing)!r}", f"{allowed}: {names}")
    return parquet


def read_batches(
    parquet: "ParquetFile", path: str, keys: Sequence[str], *, rows: int, row_groups: list[int] | None = None
) -> Iterator[dict[str, list[object]]]:
    """The values of each key, so many rows at a time, of a file from `open_parquet`; a text that is no UTF-8 is bytes.

    An `MtError` names the file if it is damaged.
    """
    from pyarrow import ArrowException

    try:
        for batch in parquet.iter_batches(rows, row_groups=row_groups, columns=list(keys)):
            yield {key: _list_values(batch.column(key)) for key in keys}
    except (ArrowException, OSError) as err:
        raise MtError(path, f"is damaged ({' '.join(str(err).split())})", "write it again") from err


def _list_values(column: "Array") -> list[object]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_get_value(value) for value in column]


def _get_value(value: "Scalar") -> object:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return b""


def _read_json_lines(path: Path, key: str) -> Iterator[tuple[str, str]]:
    for chunk in read_chunks(path):
        documents, problems = [], []
        for number, line in enumerate(chunk.lines, start=chunk.first):
            try:
                if line.strip():
                    documents.append((f"{path}:{number}", parse_line(line, (key,))[0]))
            except BadLine as err:
                problems.append(Problem(f"{path}:{number}", str(err), f'{{"{key}": "…"}} on every line'))
        raise_if(problems)
        yield from documents


def _read_rows(path: Path, key: str) -> Iterator[tuple[str, str]]:
    parquet, first = open_parquet(str(path), (key,), allowed=f"a column {key!r}; it has"), 1
    for batch in read_batches(parquet, str(path), (key,), rows=4096):
        documents, problems = [], []
        for row, value in enumerate(batch[key], start=first):
            try:
                documents.append((f"{path}: row {row}", _check_text(value, key)))
            except BadLine as err:
                problems.append(Problem(f"{path}: row {row}", str(err), "a text in every row"))
        raise_if(problems)
        yield from documents
        first += len(batch[key])


def _check_text(value: object, key: str) -> str:
    if isinstance(text := check_value(value, key), str):
        return text
    raise BadLine(f"key {key!r} is a list, not a text")
