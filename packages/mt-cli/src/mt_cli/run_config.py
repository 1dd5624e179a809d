"""The whole configuration of a run, assembled from the sections of the installed packages. Torch-free."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mt_core.config.loading import Layer, load_layers, model_union, read_layers
from mt_core.config.run_config import RunConfig
from mt_core.config.sections import Section
from mt_core.contracts import ModelConfig
from mt_core.errors import MtError
from mt_core.plugins import components

if TYPE_CHECKING:
    from mt_data.config import BERTData, FIMData, GPTData, ICTData, MockData, SFTData, T5Data

    AnyData = GPTData | BERTData | T5Data | ICTData | SFTData | FIMData | MockData

FullConfig: TypeAlias = "RunConfig[ModelConfig, AnyData]"
"""A run's configuration with any installed model and data sections; data of other packages has the same fields."""


@cache
def run_config_type() -> "type[FullConfig]":
    """The type of the tree: `model` is any installed model family, `data` comes from mt-data."""
    try:
        from mt_data.config.union import data_union
    except ModuleNotFoundError as err:
        raise MtError("data", "mt-data is not installed", "pip install mt-data") from err
    return RunConfig[model_union(), data_union()]


def load_run_config(
    files: Sequence[Path],
    overrides: Sequence[str] = (),
    preset: str | None = None,
    *,
    rules: bool = True,
    announce: bool = False,
) -> "FullConfig":
    """A validated `RunConfig`; one `MtError` with everything wrong in it. `rules` includes those between sections.

    With `announce`, a line on stderr says that a checkpoint is read, for which torch is imported.
    """
    from mt_cli.vocabulary import UnknownVocabulary, resolve_vocabulary, set_vocabulary

    layers, tree = read_run_layers(files, overrides, preset, announce=announce), run_config_type()
    try:
        return load_layers(tree, resolve_vocabulary(layers), rules=rules)
    except UnknownVocabulary as err:
        problems = err.problems
    try:
        load_layers(tree, [*layers, set_vocabulary(1)], rules=rules)
    except MtError as err:  # everything else that is wrong is told with it
        problems = tuple(dict.fromkeys((*err.problems, *problems)))
    raise UnknownVocabulary.from_problems(problems)


def read_run_layers(
    files: Sequence[Path], overrides: Sequence[str], preset: str | None, *, announce: bool = False
) -> list[Layer]:
    """Plain values of a run: the checkpoint that it begins with, its preset, the files and the overrides."""
    from mt_cli.checkpoint_init import add_checkpoint

    if not (files or overrides or preset):
        presets = ", ".join(components("preset")) or "none; pip install mt-models"
        raise MtError(
            "configuration",
            "none is given",
            f"give a TOML file, a text with mt train --data, or --preset NAME of: {presets}",
        )
    return add_checkpoint(read_layers(files, overrides, preset), announce=announce)


def load_without_tokenizer(
    files: Sequence[Path], overrides: Sequence[str] = (), preset: str | None = None, *, vocab_size: int
) -> "tuple[FullConfig, bool]":
    """A configuration whose data and tokenizer need not be there, and whether its `model.vocab_size` is known.

    Where the tokenizer would say it and is not there, it is `vocab_size`.
    """
    from mt_cli.vocabulary import UnknownVocabulary, resolve_vocabulary, set_vocabulary

    layers, tree = read_run_layers(files, overrides, preset), run_config_type()
    try:
        return load_layers(tree, resolve_vocabulary(layers), rules=False), True
    except UnknownVocabulary:
        return load_layers(tree, [*layers, set_vocabulary(vocab_size)], rules=False), False


def resolve_values(files: Sequence[Path], overrides: Sequence[str] = (), preset: str | None = None) -> dict[str, Any]:
    """Plain values of a configuration to look at; without its tokenizer `model.vocab_size` stays the word for it."""
    from mt_cli.vocabulary import FROM_TOKENIZER

    config, known = load_without_tokenizer(files, overrides, preset, vocab_size=1)
    values = config.model_dump(mode="json")
    return values if known else {**values, "model": {**values["model"], "vocab_size": FROM_TOKENIZER}}


def to_toml(values: Section | Mapping[str, Any]) -> str:
    """A resolved tree, or its plain values, as a TOML file that loads to the same tree."""
    import tomli_w

    return tomli_w.dumps(drop_unset(values.model_dump(mode="json") if isinstance(values, Section) else values))


def drop_unset(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table without what is None, as TOML has no such value."""
    return {
        key: drop_unset(value) if isinstance(value, Mapping) else value
        for key, value in table.items()
        if value is not None
    }


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested tables."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def get_table(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A table among plain values, empty if it is missing or no table."""
    table = values.get(name)
    return table if isinstance(table, Mapping) else {}


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Dotted key and both values wherever two trees differ; None stands for a missing one."""
    old, new = dict(flatten(first)), dict(flatten(second))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield key, old.get(key), new.get(key)
