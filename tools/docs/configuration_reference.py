"""Writes docs/reference/configuration.md from the configuration's own types and docstrings.

usage: python tools/docs/configuration_reference.py
"""

import math
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Lt
from pydantic.fields import FieldInfo

from mt_cli.run_config import run_config_type
from mt_cli.vocabulary import FROM_TOKENIZER
from mt_core.config.fields import list_sections
from mt_core.config.loading import model_config
from mt_core.config.sections import Section
from mt_core.plugins import Kind, components

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "configuration.md"
BOUNDS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Lt: ("lt", "<")}
NAMES = {int: "integer", float: "number", str: "string", bool: "true or false"}
INTRO = """# Configuration

<!-- Written by tools/docs/configuration_reference.py; a test compares. -->

Every field of a run's TOML file, as `section.field`. [Train](../how-to/train.md) says how files, presets and `--set`
come together; `mt config show` prints the result, and `mt config schema` this page for programs.

At the end are the names of [presets](#presets), [tokenizers](#tokenizers), [optimizers](#optimizers),
[attention cores](#attention-cores) and [checkpoint loaders](#checkpoint-loaders) that come with mt; `mt plugins` lists
those that are installed.
"""
NAMED: tuple[tuple[str, Kind, str, str], ...] = (
    ("Tokenizers", "tokenizer", "data.tokenizer.type", "The tokenizer that made the corpora."),
    ("Optimizers", "optimizer", "optim.name", "What updates the parameters."),
    ("Attention cores", "attention", "model.attention.core", 'Besides "auto", which takes the fastest that runs.'),
    ("Checkpoint loaders", "ckpt-loader", "checkpoint.init", "What stands before the colon of LOADER:PATH."),
)
"""Title, kind of component, field that takes their names, and a sentence about them."""


def render_page() -> str:
    """Return the text of the page."""
    tree = run_config_type()
    lines = [
        INTRO,
        *(line for name, field in tree.model_fields.items() for line in render_section(name, list_sections(field))),
    ]
    return "\n".join([*lines, *render_presets(), *render_names()]) + "\n"


def render_section(path: str, types: list[type[Section]]) -> Iterator[str]:
    """Yield a heading and a table for each type that the section at `path` may have, then its own sections."""
    for type_ in types:
        kind = type_.model_fields.get("kind")
        yield f"## {path}" + (f' (kind = "{kind.default}")' if kind and len(types) > 1 else "")
        yield f"\n{type_.__doc__}\n"
        yield "| field | value | default | meaning |\n| --- | --- | --- | --- |"
        yield from (render_row(path, name, field) for name, field in type_.model_fields.items())
        yield ""
        for name, field in type_.model_fields.items():
            yield from render_section(f"{path}.{name}", list_sections(field))


def render_row(path: str, name: str, field: FieldInfo) -> str:
    """Return one line of a table."""
    if nested := list_sections(field):
        kinds = [member.model_fields["kind"].default for member in nested if "kind" in member.model_fields]
        value = "table" + (f" of kind {' or '.join(f'`{kind}`' for kind in kinds)}" if len(kinds) > 1 else "")
    else:
        value = describe_values(field.annotation, field.metadata)
    meaning = field.description or ("Names this part." if name == "kind" else "")
    cells = (f"`{path}.{name}`", value, describe_default(field), meaning)
    return join_cells(*cells)


def join_cells(*cells: str) -> str:
    """Return one line of a table; a cell's own line breaks become spaces, as they would end the row."""
    return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |"


def describe_values(annotation: Any, metadata: list[Any]) -> str:
    """Describe the values that a field takes."""
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is tuple:
        inner = describe_values(get_args(annotation)[0], [])
        return "list of strings" if inner == "string" else f"list of {inner}"
    if hasattr(annotation, "__metadata__"):  # Annotated inside an optional field
        return describe_values(annotation.__origin__, list(annotation.__metadata__))
    if parts := [part for part in get_args(annotation) if part is not type(None)]:
        return describe_values(parts[0], metadata)
    bounds = [
        f"{sign} {getattr(m, key)}" for m in metadata for type_, (key, sign) in BOUNDS.items() if type(m) is type_
    ]
    return " ".join([NAMES[annotation], ", ".join(bounds)]).strip()


def describe_default(field: FieldInfo) -> str:
    """Describe the value of a field that is not given."""
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return "another field's"
    if field.default is None:
        return "unset"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    return f"`{list(field.default) if isinstance(field.default, tuple) else field.default}`"


def render_presets() -> Iterator[str]:
    """Yield the table of presets."""
    yield "## Presets\n\nA preset sets the model and some of the fields above; give what differs in a file.\n"
    yield "| preset | parameters | layers | width | heads | positions | summary |"
    yield "|" + " --- |" * 7
    for name, component in components("preset").items():
        values = tomllib.loads(component.load().read_text(encoding="utf-8"))["model"]
        sizes = [values["vocab_size"]] if values["vocab_size"] != FROM_TOKENIZER else [1, 2]
        count, *more = (count_parameters(values | {"vocab_size": size}) for size in sizes)
        model = model_config(values | {"vocab_size": sizes[0]})
        parameters = f"{2 * count - more[0]:,} + {more[0] - count:,} × ids" if more else f"{count:,}"
        cells = (parameters, model.layers, model.hidden_size, model.attention.heads, model.max_seq_len)
        yield join_cells(f"`{name}`", *map(str, cells), component.summary)


def count_parameters(values: dict[str, Any]) -> int:
    """Count the parameters of a model section as plain values."""
    return sum(math.prod(shape) for shape in model_config(values).canonical_shapes().values())


def render_names() -> Iterator[str]:
    """Yield a table of names for each field whose values are the installed components of a kind."""
    for title, kind, field, text in NAMED:
        yield f"\n## {title}\n\n{text}\n"
        yield f"| `{field}` | summary |\n| --- | --- |"
        yield from (join_cells(f"`{name}`", component.summary) for name, component in components(kind).items())


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")
