"""How the configurations of two checkpoints differ."""

from collections.abc import Iterator, Mapping
from typing import Any

from mt_core.config.sections import Section
from mt_core.contracts import CheckpointLoader

HOW_NOT_WHAT = ("attention.core", "vocab_divisor")
"""Settings that say how to compute a model, not what it is."""


def changed_settings(left: CheckpointLoader, right: CheckpointLoader) -> Iterator[tuple[str, Any, Any]]:
    """Path, left value and right value of each setting of the model in which two checkpoints differ."""
    ours, theirs = (dict(_flat(_values(loader))) for loader in (left, right))
    for path in {**ours, **theirs}:
        if ours.get(path) != theirs.get(path) and path not in HOW_NOT_WHAT:
            yield path, ours.get(path), theirs.get(path)


def _values(loader: CheckpointLoader) -> dict[str, Any]:
    config = loader.config()
    assert isinstance(config, Section)
    return config.model_dump(mode="json")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
