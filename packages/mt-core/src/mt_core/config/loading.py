"""From TOML files, presets and `--set a.b=c` to one frozen, validated tree; all problems are reported at once.

Precedence: defaults < preset < files in order < `--set`.
"""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from mt_core.config.renamed_keys import find_renamed, translate
from mt_core.config.sections import SCHEDULE_ALTERNATIVES, Section
from mt_core.errors import MtError, Problem, raise_if, suggest_file
from mt_core.plugins import component, components, did_you_mean, manager

TOML = "give a TOML file of settings"
TEXTS = (".txt", ".jsonl", ".ndjson", ".json", ".md", ".parquet", ".gz", ".zst")
"""Suffixes of what is rather a text than settings."""
Tree = TypeVar("Tree", bound=Section)
"""The type of the configuration that is loaded."""
LONGEST_VALUE = 200
"""Characters of a wrong value that a message shows."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Plain values and their source."""

    source: str
    values: Mapping[str, Any]


def read_toml(path: Path, source: str | None = None) -> Layer:
    """One file; one that cannot be read, or a syntax error (with its line), is an `MtError`."""
    try:
        return Layer(source or str(path), _parse_toml(path.read_text(encoding="utf-8")))
    except FileNotFoundError as err:
        raise MtError(str(path), "no such file", _suggest_instead(path)) from err
    except IsADirectoryError as err:
        has_config = (path / "config.toml").is_file()
        allowed = f"did you mean {path / 'config.toml'}?" if has_config else TOML
        raise MtError(str(path), "is a directory", allowed) from err
    except OSError as err:
        raise MtError(str(path), f"cannot be read: {err.strerror}", TOML) from err
    except ValueError as err:
        text = f"; a text to train on goes to: mt train --data {path}" if path.suffix in TEXTS else ""
        raise MtError(str(path), f"not TOML: {err}", "" if path.suffix == ".toml" else TOML + text) from err


def _parse_toml(text: str) -> dict[str, Any]:
    """The tables of a text; a `ValueError` for whatever is wrong with it, too much for Python included."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _suggest_instead(path: Path) -> str:
    """What may have been meant by a path where no file is: a setting, or a file with a name like it."""
    if re.fullmatch(r"[a-z][a-z0-9_.]*=.*", str(path), re.DOTALL):
        return f"did you mean --set {path}?"
    hint = suggest_file(path)
    return TOML if hint.startswith("nothing") else hint


def read_preset(name: str) -> Layer:
    """A preset by name."""
    return read_toml(Path(str(component("preset", name))), f"preset {name}")


def read_override(text: str) -> Layer:
    """`a.b=c` as a layer; the value is TOML, or else a plain string."""
    path, equals, value = text.partition("=")
    if not equals or not all(path.split(".")):
        raise MtError(f"--set {text}", "not of the form section.field=value", "for example --set batch.micro_batch=4")
    try:
        parsed: Any = _parse_toml(f"value = {value}")["value"]
    except ValueError:
        parsed = value
    for key in reversed(path.strip().split(".")):
        parsed = {key: parsed}
    return Layer("--set", parsed)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, table by table; a table whose `kind` changes is replaced as a whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and value.get("kind") in (None, old.get("kind")):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def load(
    tree: type[Tree],
    files: Sequence[Path],
    overrides: Sequence[str] = (),
    preset: str | None = None,
    *,
    rules: bool = True,
) -> Tree:
    """The validated tree; `rules` also checks the rules of plugins between sections, such as files that must exist.

    A file may name its preset with a top-level `preset = "NAME"`.
    """
    return load_layers(tree, read_layers(files, overrides, preset), rules=rules)


def read_layers(files: Sequence[Path], overrides: Sequence[str] = (), preset: str | None = None) -> list[Layer]:
    """The preset, the files and the overrides, lowest first."""
    layers = [read_toml(path) for path in files]
    for layer in layers:
        preset = preset or layer.values.get("preset")
    layers = [Layer(x.source, {k: v for k, v in x.values.items() if k != "preset"}) for x in layers]
    return [*([read_preset(preset)] if preset else []), *layers, *map(read_override, overrides)]


def merge_layers(layers: Sequence[Layer]) -> dict[str, Any]:
    """All layers in one tree of plain values; in `lr_schedule` a key replaces those below that say the same."""
    values: dict[str, Any] = {}
    for layer in layers:
        schedule, above = values.get("lr_schedule"), layer.values.get("lr_schedule")
        if isinstance(schedule, Mapping) and isinstance(above, Mapping):
            replaced = {pair[1 - n] for pair in SCHEDULE_ALTERNATIVES for n in (0, 1) if pair[n] in above}
            values["lr_schedule"] = {key: value for key, value in schedule.items() if key not in replaced}
        values = merge(values, layer.values)
    return values


def load_layers(tree: type[Tree], layers: Sequence[Layer], *, rules: bool = True) -> Tree:
    """The validated tree of layers, lowest first; `rules` as in `load`."""
    config = validate(tree, merge_layers(layers), layers)
    if rules:
        raise_if(rule_problems(config))
    return config


def validate(tree: type[Tree], values: Mapping[str, Any], layers: Sequence[Layer] = ()) -> Tree:
    """`values` as a `tree`, or one `MtError` naming every wrong field and where its value came from."""
    problems = [
        Problem(locate(layers, old.split(".")), "unknown key", f"did you mean {new!r}?")
        for old, new in find_renamed(values)
    ]
    values = translate(values)
    try:
        config = tree.model_validate(values)
    except ValidationError as err:
        layers = [Layer(x.source, translate(x.values)) for x in layers]
        errors = [
            error for error in err.errors() if error["type"] != "default_factory_not_called"
        ]  # follow from others
        errors.sort(key=lambda error: error["type"] == "missing")  # what the user wrote comes first
        problems += [_problem(tree, values, layers, dict(error)) for error in errors]
        raise MtError.from_problems(problems) from None
    raise_if(problems)
    return config


def rule_problems(config: Section) -> Iterator[Problem]:
    """Every problem that the rules of installed plugins report for a valid tree."""
    for problems in manager().hook.mt_config_rules(config=config):
        yield from problems


def model_config(values: Mapping[str, Any]) -> Any:
    """A model section as plain values → the configuration of that kind of model."""
    section: type[Section] = component("model", str(values.get("kind", "gpt")))
    return validate(section, values, [Layer("model", {})])


def model_union() -> Any:
    """The type of the model section: every installed `model` component, discriminated by `kind`."""
    from typing import Annotated, Union

    from pydantic import Field

    kinds = [each.load() for each in components("model").values()]
    if not kinds:
        raise MtError("model", "no model family is installed", "pip install mt-models")
    return kinds[0] if len(kinds) == 1 else Annotated[Union[tuple(kinds)], Field(discriminator="kind")]  # noqa: UP007


def _problem(tree: type[Section], values: Any, layers: Sequence[Layer], error: dict[str, Any]) -> Problem:
    section, path = _resolve_location(tree, values, error["loc"])
    where = locate(layers, path)
    if error["type"] == "extra_forbidden":
        return Problem(where, "unknown key", did_you_mean(path[-1], section.model_fields) if section else "")
    if error["type"] == "missing":
        return Problem(where, "required, but not given", "set it in a file, a preset or with --set")
    return value_problem(where, error)


def locate(layers: Sequence[Layer], path: Sequence[str]) -> str:
    """A key as messages name it: after the layer that set it last, if there is one."""
    where = ".".join(path) or "configuration"
    source = next((x.source for x in reversed(layers) if _contains(x.values, path)), "")
    return f"{source}: {where}" if source else where


def value_problem(where: str, error: Mapping[str, Any]) -> Problem:
    """One of pydantic's errors as a problem: the actual value and what is wrong with it."""
    message, kind = error["msg"].removeprefix("Value error, "), error["type"]
    if kind == "tuple_type":
        item = json.dumps(error["input"] if isinstance(error["input"], str) else "…", ensure_ascii=False)
        return Problem(where, f"{error['input']!r}", f"a list, in brackets: [{item}]")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return Problem(where, f"{error['input']!r}", f"a table: set its fields, as {where.rpartition(' ')[2]}.FIELD")
    if isinstance(error["input"], Mapping):
        return Problem(where, message)
    shown = repr(error["input"])
    shown = shown if len(shown) <= LONGEST_VALUE else f"{shown[:LONGEST_VALUE]}…"
    return Problem(where, shown, message[:1].lower() + message[1:])


def _resolve_location(
    tree: type[Section], values: Any, loc: Sequence[int | str]
) -> tuple[type[BaseModel] | None, list[str]]:
    """The section with the last key of `loc`, and `loc` as the user writes it, without the tags of unions."""
    section: type[BaseModel] | None = tree
    path: list[str] = []
    for key in map(str, loc):
        fields = section.model_fields if section else {}
        is_tag = isinstance(values, Mapping) and key not in values and key == str(values.get("kind", key)) and path
        if is_tag and key not in fields:
            continue
        path.append(key)
        values = values.get(key) if isinstance(values, Mapping) else None
        if key in fields and isinstance(values, Mapping):
            section = _select_section(fields[key].annotation, values)
        elif key in fields:
            section = section if key == str(loc[-1]) else None
    return section, path


def _select_section(annotation: Any, values: Mapping[str, Any]) -> type[BaseModel] | None:
    """The member of a field's type that `values` selects by its `kind`."""
    from typing import get_args

    members = [m for m in (annotation, *get_args(annotation)) if isinstance(m, type) and issubclass(m, BaseModel)]
    for member in members:
        kind = member.model_fields.get("kind")
        if kind is None or values.get("kind", kind.default) == kind.default:
            return member
    return None


def _contains(values: Any, path: Sequence[str]) -> bool:
    for key in path:
        if not isinstance(values, Mapping) or key not in values:
            return False
        values = values[key]
    return True


def schema(tree: type[Section]) -> dict[str, Any]:
    """JSON schema of the tree, with every field's documentation."""
    return TypeAdapter(tree).json_schema()
