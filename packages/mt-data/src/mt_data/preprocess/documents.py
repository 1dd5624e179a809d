"""One line of JSON to the texts of its keys, or what is wrong with it."""

import json
from collections.abc import Sequence

from mt_core.errors import Problem
from mt_data.preprocess.lines import Chunk

JSON_TYPES = {dict: "an object", list: "a list", int: "a number", float: "a number", bool: "a boolean"}


class BadLine(ValueError):
    """Why a line is not a document."""


def parse_chunk(chunk: Chunk, keys: Sequence[str]) -> tuple[list[tuple[str, ...]], list[Problem]]:
    """The texts of every good line, and a problem `file:line` for each of the others."""
    documents, problems = [], []
    for number, line in enumerate(chunk.lines, start=chunk.first):
        try:
            documents.append(parse_line(line, keys))
        except BadLine as err:
            problems.append(Problem(f"{chunk.path}:{number}", str(err), "one JSON object a line"))
    return documents, problems


def parse_line(line: bytes, keys: Sequence[str]) -> tuple[str, ...]:
    """The texts under `keys`; `BadLine` if the line is blank, not UTF-8, not a JSON object, or lacks one."""
    if not line.strip():
        raise BadLine("is blank")
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as err:
        raise BadLine(f"is not UTF-8 at byte {err.start + 1}") from None
    except json.JSONDecodeError as err:
        raise BadLine(f"is not JSON: {err.msg} at column {err.colno}") from None
    except RecursionError:
        raise BadLine("is nested too deeply") from None
    if not isinstance(value, dict):
        raise BadLine(f"is {_name(value)}, not an object")
    return tuple(_text(value, key) for key in keys)


def _text(value: dict[str, object], key: str) -> str:
    if key not in value:
        raise BadLine(f"has no key {key!r}, only {', '.join(map(repr, value)) or 'none'}")
    text = value[key]
    if not isinstance(text, str):
        raise BadLine(f"key {key!r} is {_name(text)}, not a text")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in set(text)):
        raise BadLine(f"key {key!r} holds half a surrogate pair, which is no character")
    return text


def _name(value: object) -> str:
    return JSON_TYPES.get(type(value), "null" if value is None else "a text")
