"""Read the texts that a task is run on: JSON lines with a text field, or one plain file."""

import json
from collections.abc import Iterator
from pathlib import Path

from mt_core.errors import MtError


def read_text(path: Path) -> str:
    """A whole UTF-8 file, line ends kept as they are."""
    if not path.is_file():
        raise MtError(str(path), "no such file", "the path of a text file")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as err:
        raise MtError(str(path), f"byte {err.start} is not UTF-8", "a UTF-8 text file") from err


def read_json_lines(path: Path, key: str = "text") -> Iterator[tuple[str, str]]:
    """`file:line` and text of every line that is not blank; a bad line is an error that names it."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as err:
            raise MtError(
                where, f"not JSON ({err.msg}, column {err.colno})", f'{{"{key}": "…"}} on every line'
            ) from err
        if not isinstance(record, dict) or not isinstance(record.get(key), str):
            raise MtError(where, f"no text under {key!r}", f'{{"{key}": "…"}} on every line')
        yield where, record[key]
