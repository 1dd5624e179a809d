"""Rows of the tables between Megatron's `args` and our settings: every row reads and writes.

gpt.py, bert.py and t5.py have a table each.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.parameters.table import Shape
from mt_core.errors import MtError, Problem
from mt_models.config import TransformerConfig

Settings = dict[str, Any]
"""Values of ours by their path in the configuration, such as attention.heads."""
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """What a checkpoint says of its model."""

    get: Callable[[str], Any]
    """The value of an argument; None if args lack it."""
    shapes: Mapping[str, Shape]
    """Shapes of the tensors, under Core's names."""
    core: bool = True
    """Whether Megatron-Core wrote it; else the old classes did."""


@dataclass(frozen=True)
class Row:
    """Settings of ours and the arguments that stand for them."""

    write: Callable[[Any, Layout], Arguments]
    """Arguments of a configuration that is cut by a layout."""
    read: Callable[[Source], Settings]


def rename(path: str, *names: str, default: Any = None) -> Row:
    """A row of a value that is the same on both sides; the first of the names is read that has one."""

    def write(config: TransformerConfig, layout: Layout) -> Arguments:
        return dict.fromkeys(names, _look_up(config, path))

    def read(source: Source) -> Settings:
        return {path: next((value for name in names if (value := source.get(name))), default)}

    return Row(write, read)


def spell(path: str, name: str, spelling: Mapping[str, str], default: str) -> Row:
    """A row of a word that Megatron spells otherwise: `spelling` is theirs to ours, and `default` theirs."""
    theirs = {ours: word for word, ours in spelling.items()}
    return Row(
        lambda config, layout: {name: theirs[_look_up(config, path)]},
        lambda source: {path: spelling[source.get(name) or default]},
    )


def _look_up(config: TransformerConfig, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def read_rows(rows: Iterable[Row], source: Source) -> dict[str, Any]:
    """The settings of all rows as a tree."""
    tree: dict[str, Any] = {}
    for path, value in (item for row in rows for item in row.read(source).items()):
        *sections, name = path.split(".")
        section = tree
        for key in sections:
            section = section.setdefault(key, {})
        section[name] = value
    return tree


def describe_invalid_args(err: ValidationError, where: str) -> MtError:
    """The error for args whose settings no model of ours can have."""
    return MtError.from_problems(
        Problem(where, f"args: {error['msg']}", "the checkpoint cannot be read") for error in err.errors()
    )
