"""Configurations as flat, plain values."""

from collections.abc import Iterator, Mapping
from typing import Any


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested tables."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Dotted key and both values wherever two trees differ; None stands for a missing one."""
    one, two = dict(flat(first)), dict(flat(second))
    for key in sorted(one.keys() | two.keys()):
        if one.get(key) != two.get(key):
            yield key, one.get(key), two.get(key)
