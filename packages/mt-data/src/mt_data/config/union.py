"""Every kind of data section that is installed, and their union: the type of `[data]`. Imports neither torch nor numpy.

A dataset of another package brings its own section: the function that its component names is annotated with it, as in
`def build_splits(config: MyData, *, samples, seed, cache_dir, builder=True) -> Splits`. The module of that function is
imported whenever a configuration is read, so what is slow to import stands inside the function.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Annotated, Any, Union, get_type_hints

from pydantic import BeforeValidator, Field

from mt_core.errors import MtError
from mt_core.plugins import Component, components, did_you_mean
from mt_data.config import BUILTIN_SECTIONS, DataConfig

BUILTIN_KINDS: dict[str, type[DataConfig]] = {
    str(section.model_fields["kind"].default): section for section in BUILTIN_SECTIONS
}
"""Sections of the kinds that mt-data builds itself, known without importing what builds them."""


def list_data_kinds() -> dict[str, type[DataConfig]]:
    """Kind and section, mt-data's own first. One that cannot be used is left out until somebody asks for it."""
    others = {name: dataset for name, dataset in components("dataset").items() if name not in BUILTIN_KINDS}
    return BUILTIN_KINDS | {
        name: section for name, dataset in others.items() if (section := _get_section_or_none(dataset))
    }


def data_union() -> Any:
    """The type of the data section: told apart by `kind`, which is "gpt" if it is not given."""
    sections = tuple(list_data_kinds().values())
    return Annotated[Union[sections], Field(discriminator="kind"), BeforeValidator(_check_kind)]  # noqa: UP007


def get_section(dataset: Component) -> type[DataConfig]:
    """The section that a dataset's function takes; `MtError` if it does not say so."""
    build = dataset.load()
    try:
        first = next(iter(signature(build).parameters), "")
        section = get_type_hints(build).get(first)
    except (TypeError, ValueError, NameError):  # no function, or an annotation that names nothing
        section = None
    if not (isinstance(section, type) and issubclass(section, DataConfig) and _default_kind(section) == dataset.name):
        raise MtError(
            f"dataset {dataset.name!r}",
            f"{dataset.target} does not say which section it reads",
            f"annotate its first parameter with a subclass of mt_data.config.DataConfig that has "
            f'kind: Literal["{dataset.name}"] = "{dataset.name}"',
        )
    return section


def _default_kind(section: type[DataConfig]) -> Any:
    return section.model_fields["kind"].default if "kind" in section.model_fields else None


def _get_section_or_none(dataset: Component) -> type[DataConfig] | None:
    try:
        return get_section(dataset)
    except Exception:  # somebody else's dataset must not take `mt` down; `_check_kind` says what is wrong with it
        return None


def _check_kind(values: Any) -> Any:
    """Take a section without `kind` for "gpt"; refuse an unknown or broken kind, with the nearest name or reason."""
    if not isinstance(values, Mapping):
        return values
    kind = str(values.get("kind", "gpt"))
    if kind not in BUILTIN_KINDS:
        known = components("dataset")
        if kind not in known:
            raise ValueError(
                f"unknown kind {kind!r}; {did_you_mean(kind, [*BUILTIN_KINDS, *(set(known) - BUILTIN_KINDS.keys())])}"
            )
        get_section(known[kind])
    return {"kind": kind, **values}
