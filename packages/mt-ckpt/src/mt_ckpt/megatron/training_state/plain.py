"""Megatron's arguments as plain values: what its weights-only reader takes back (docs/specs/checkpoints.md §1.5)."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import PurePath
from signal import Signals
from types import SimpleNamespace
from typing import Any

import torch

SCALARS = (type(None), bool, int, float, str, bytes, torch.dtype, Signals)


def plain_args(args: Any) -> tuple[dict[str, Any], list[str]]:
    """The arguments whose values are plain, paths as text, and the names of the others."""
    values = {name: _plain(value) for name, value in vars(args).items()}
    lost = sorted(name for name, value in values.items() if value is _LOST)
    return {name: value for name, value in values.items() if value is not _LOST}, lost


class _Lost:
    """Marks a value of a class of Megatron's own."""


_LOST = _Lost()


def _plain(value: Any) -> Any:
    if isinstance(value, PurePath):
        return str(value)
    if type(value) in SCALARS or isinstance(value, Signals):
        return value
    if type(value) in (list, tuple, set):
        parts = [_plain(part) for part in value]
        return _LOST if _LOST in parts else type(value)(parts)
    if isinstance(value, Mapping):
        items = {key: _plain(part) for key, part in value.items()}
        return _LOST if _LOST in items.values() else items
    if type(value) in (Namespace, SimpleNamespace):
        parts = _plain(vars(value))
        return _LOST if parts is _LOST else type(value)(**parts)
    return _LOST
