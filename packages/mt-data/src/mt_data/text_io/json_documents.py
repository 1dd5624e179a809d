"""One line of JSON, or one row, to the texts of its keys, or what is wrong with it."""

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from mt_core.errors import Problem
from mt_data.text_io.lines import LineChunk

JSON_TYPES = {dict: "an object", list: "a list", int: "a number", float: "a number", bool: "a boolean"}
LONE_SURROGATE = re.compile("[\ud800-\udfff]")

TextValue = str | list[str]
"""A text, or a text that is already cut into sentences (docs/specs/data.md §2.4)."""


class BadLine(ValueError):
    """Why a line is not a document."""


def parse_chunk(chunk: LineChunk, keys: Sequence[str]) -> tuple[list[tuple[str, ...]], list[Problem]]:
    """The texts of every good line, and a problem `file:line` for each of the others."""
    documents, problems = [], []
    for number, line in enumerate(chunk.lines, start=chunk.first):
        try:
            documents.append(parse_line(line, keys))
        except BadLine as err:
            problems.append(Problem(f"{chunk.path}:{number}", str(err), "one JSON object a line"))
    return documents, problems


def parse_line(line: bytes, keys: Sequence[str]) -> tuple[str, ...]:
    """The texts under `keys`; `BadLine` for a list of them too, and for all that `parse_values` refuses."""
    return check_texts(parse_object(line), keys)


def check_texts(record: dict[str, Any], keys: Sequence[str]) -> tuple[str, ...]:
    """The texts under `keys`; `BadLine` if one is missing or no text, a list of them included."""
    texts = []
    for key, value in zip(keys, check_values(record, keys), strict=True):
        if not isinstance(value, str):
            raise BadLine(f"key {key!r} is a list, not a text")
        texts.append(value)
    return tuple(texts)


def parse_values(line: bytes, keys: Sequence[str]) -> tuple[TextValue, ...]:
    """The values under `keys`; `BadLine` if the line lacks one, and for all that `parse_object` refuses."""
    return check_values(parse_object(line), keys)


def check_values(record: dict[str, Any], keys: Sequence[str]) -> tuple[TextValue, ...]:
    """The values under `keys`; `BadLine` if one is missing, or neither a text nor a list of texts."""
    for key in keys:
        if key not in record:
            raise BadLine(f"has no key {key!r}, only {', '.join(map(repr, record)) or 'none'}")
    return tuple(check_value(record[key], key) for key in keys)


def parse_object(line: bytes) -> dict[str, Any]:
    """The object of a line; `BadLine` if it is blank, not UTF-8, not JSON, not an object, or too much for Python."""
    if not line.strip():
        raise BadLine("is blank")
    text = decode_utf8(line)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as err:
        raise BadLine(f"is not JSON: {err.msg} at column {err.colno}") from None
    except RecursionError:
        raise BadLine("is nested too deeply") from None
    except ValueError:
        raise BadLine(f"holds a whole number of more than {sys.get_int_max_str_digits():,} digits") from None
    if not isinstance(value, dict):
        raise BadLine(f"is {_name_type(value)}, not an object")
    return value


def decode_utf8(text: bytes) -> str:
    """Text of UTF-8 bytes; `BadLine` says which byte is not."""
    try:
        return text.decode()
    except UnicodeDecodeError as err:
        raise BadLine(f"is not UTF-8 at byte {err.start + 1}") from None


def check_value(value: Any, key: str) -> TextValue:
    """The value if it is a text or a list of texts; else `BadLine`."""
    for text in value if isinstance(value, list) else (value,):
        if isinstance(text, bytes):
            raise BadLine(f"key {key!r} is bytes, not UTF-8 text")
        if not isinstance(text, str):
            inside = "a list with " if isinstance(value, list) else ""
            raise BadLine(f"key {key!r} is {inside}{_name_type(text)}, not a text")
        if find_surrogate(text) is not None:
            raise BadLine(f"key {key!r} holds half a surrogate pair, which is no character")
    return value


def find_surrogate(value: object) -> str | None:
    """The first text in a JSON value, keys included, that holds half a surrogate pair, which UTF-8 cannot write."""
    if isinstance(value, str):
        return None if value.isascii() or not LONE_SURROGATE.search(value) else value
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((text for part in parts if (text := find_surrogate(part)) is not None), None)


def _name_type(value: object) -> str:
    other = "null" if value is None else "a text" if isinstance(value, str) else f"a {type(value).__name__}"
    return JSON_TYPES.get(type(value), other)
