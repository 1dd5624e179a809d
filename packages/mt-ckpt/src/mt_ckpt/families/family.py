"""What there is to say about one Hugging Face family: how it names tensors and where config.json keeps what."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mt_ckpt.names import Names
from mt_models.config import GPTConfig

REQUIRED = object()
"""Default of a key that config.json must have."""

Unpack = Callable[[str, Tensor], Iterable[tuple[str, Tensor]]]
Pack = Callable[[Iterable[tuple[str, Tensor]]], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True)
class Key:
    """A key of config.json that holds one of our values."""

    name: str
    default: Any = REQUIRED
    """Value when the key is absent or null; a function gets the whole config.json."""
    spelling: Mapping[str, str] = field(default_factory=dict)
    """Our values to theirs, where they differ."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Further values of theirs that mean one of ours."""


def _as_is(name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
    return [(name, tensor)]


def _unchanged(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    yield from tensors


def _no_limits(config: GPTConfig) -> Iterable[str]:
    return ()


@dataclass(frozen=True)
class Family:
    """Tables that translate one family both ways."""

    model_type: str
    architecture: str
    prefix: str
    """What the names of the base model start with; files saved from the base model alone lack it."""
    names: Names
    keys: Mapping[str, Key]
    """Our configuration path to their key."""
    always: Mapping[str, Any]
    """Our configuration path to the value that every model of the family has; a function gets config.json."""
    required: Mapping[str, Any] = field(default_factory=dict)
    """Their switches that change what the model computes: the only value we implement, also when absent."""
    window: tuple[str, int] | None = None
    """The key of a sliding attention window and its value when absent."""
    limits: Callable[[GPTConfig], Iterable[str]] = _no_limits
    """Why transformers would refuse a configuration of this family."""
    unpack: Unpack = _as_is
    """One stored tensor as the tensors that `names` knows."""
    pack: Pack = _unchanged
    """The reverse of `unpack`, over a stream of all tensors."""
