"""Writes docs/reference/configuration.md from the configuration's own types and docstrings.

usage: python docs/configuration_reference.py
"""

import math
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Lt
from pydantic.fields import FieldInfo

from mt_cli.run_config import run_config_type
from mt_core.config.loading import model_config
from mt_core.config.sections import Section
from mt_core.plugins import components

PAGE = Path(__file__).parent / "reference" / "configuration.md"
BOUNDS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Lt: ("lt", "<")}
NAMES = {int: "integer", float: "number", str: "string", bool: "true or false"}
INTRO = """# Configuration

<!-- Written by docs/configuration_reference.py; a test compares. -->

Every field of a run's TOML file, as `section.field`. [Train](../how-to/train.md) says how files, presets and `--set`
come together; `mt config show` prints the result, and `mt config schema` this page for programs.

[Presets](#presets) are at the end.
"""


def page() -> str:
    """The whole page."""
    tree = run_config_type()
    lines = [INTRO, *(line for name, field in tree.model_fields.items() for line in section(name, members(field)))]
    return "\n".join([*lines, *presets()]) + "\n"


def members(field: FieldInfo | Any) -> list[type[Section]]:
    """The sections that a field may hold."""
    annotation = field.annotation if isinstance(field, FieldInfo) else field
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for part in get_args(annotation) for found in members(part)]


def section(path: str, types: list[type[Section]]) -> Iterator[str]:
    """A heading and a table for each type that the section at `path` may have, then its own sections."""
    for type_ in types:
        kind = type_.model_fields.get("kind")
        yield f"## {path}" + (f' (kind = "{kind.default}")' if kind and len(types) > 1 else "")
        yield f"\n{type_.__doc__}\n"
        yield "| field | value | default | meaning |\n| --- | --- | --- | --- |"
        yield from (row(path, name, field) for name, field in type_.model_fields.items())
        yield ""
        for name, field in type_.model_fields.items():
            yield from section(f"{path}.{name}", members(field))


def row(path: str, name: str, field: FieldInfo) -> str:
    """One line of a table."""
    if nested := members(field):
        kinds = [member.model_fields["kind"].default for member in nested if "kind" in member.model_fields]
        value = "table" + (f" of kind {' or '.join(f'`{kind}`' for kind in kinds)}" if len(kinds) > 1 else "")
    else:
        value = value_text(field.annotation, field.metadata)
    meaning = field.description or ("Names this part." if name == "kind" else "")
    cells = (f"`{path}.{name}`", value, default_text(field), meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def value_text(annotation: Any, metadata: list[Any]) -> str:
    """Which values a field takes."""
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is tuple:
        inner = value_text(get_args(annotation)[0], [])
        return "list of strings" if inner == "string" else f"list of {inner}"
    if hasattr(annotation, "__metadata__"):  # Annotated inside an optional field
        return value_text(annotation.__origin__, list(annotation.__metadata__))
    if parts := [part for part in get_args(annotation) if part is not type(None)]:
        return value_text(parts[0], metadata)
    bounds = [
        f"{sign} {getattr(m, key)}" for m in metadata for type_, (key, sign) in BOUNDS.items() if type(m) is type_
    ]
    return " ".join([NAMES[annotation], ", ".join(bounds)]).strip()


def default_text(field: FieldInfo) -> str:
    """What holds if the field is not given."""
    if field.is_required():
        return "required"
    if field.default is None:
        return "unset"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    return f"`{list(field.default) if isinstance(field.default, tuple) else field.default}`"


def presets() -> Iterator[str]:
    """The table of presets."""
    yield "## Presets\n\nA preset sets the model and some of the fields above; give what differs in a file.\n"
    yield "| preset | parameters | layers | width | heads | positions | summary |"
    yield "|" + " --- |" * 7
    for name, found in components("preset").items():
        model = model_config(tomllib.loads(found.load().read_text(encoding="utf-8"))["model"])
        count = sum(math.prod(shape) for shape in model.canonical_shapes().values())
        cells = (f"{count:,}", model.layers, model.hidden_size, model.attention.heads, model.max_seq_len)
        yield f"| `{name}` | {' | '.join(map(str, cells))} | {found.summary} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
