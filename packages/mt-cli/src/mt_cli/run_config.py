"""The whole configuration of a run, assembled from the sections of the installed packages. Torch-free."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mt_core.config.loading import load_layers, model_union, read_layers
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
    files: Sequence[Path], overrides: Sequence[str] = (), preset: str | None = None, *, rules: bool = True
) -> "FullConfig":
    """A validated `RunConfig`; one `MtError` with everything wrong in it. `rules` includes those between sections."""
    from mt_cli.checkpoint_init import add_checkpoint
    from mt_cli.vocabulary import resolve_vocabulary

    if not (files or overrides or preset):
        presets = ", ".join(components("preset")) or "none; pip install mt-models"
        raise MtError("configuration", "none is given", f"give a TOML file, or --preset NAME of: {presets}")
    layers = resolve_vocabulary(add_checkpoint(read_layers(files, overrides, preset)))
    return load_layers(run_config_type(), layers, rules=rules)


def to_toml(config: Section) -> str:
    """The resolved tree as a TOML file that loads to the same tree."""
    import tomli_w

    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested tables."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Dotted key and both values wherever two trees differ; None stands for a missing one."""
    old, new = dict(flatten(first)), dict(flatten(second))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield key, old.get(key), new.get(key)
