"""Every field of a tree of sections, by its dotted key; the shell's completion and the reference list them."""

from collections.abc import Iterator
from typing import Any, get_args

from pydantic.fields import FieldInfo

from mt_core.config.sections import Section


def list_sections(field: FieldInfo | object) -> list[type[Section]]:
    """The types of section that a field, or an annotation, may have."""
    annotation = field.annotation if isinstance(field, FieldInfo) else field
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in list_sections(part)]


def iterate_settings(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted keys of values, not of tables, and their fields; a key that several kinds of a table have comes again."""
    for name, field in section.model_fields.items():
        nested = list_sections(field)
        if not nested:
            yield f"{prefix}{name}", field
        for member in nested:
            yield from iterate_settings(member, f"{prefix}{name}.")


def describe_setting(field: FieldInfo | Any) -> str:
    """The first sentence of a field's documentation."""
    return " ".join((field.description or "").split()).partition(". ")[0]
