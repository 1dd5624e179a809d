"""Between config.json of a Hugging Face family and `GPTConfig`, driven by the family's tables.

Reading refuses what the file asks for and we do not compute, all of it at once. Writing is checked by reading back.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from mt_ckpt.families.family import REQUIRED, Family, Key
from mt_core.errors import MtError, Problem, raise_if
from mt_models.config import GPTConfig

NOT_SEMANTIC = {"kind", "attention.core", "vocab_divisor"}
"""Our settings that say how to compute, not what; no other format carries them."""


@dataclass(frozen=True)
class Reading:
    """What config.json says, in our terms."""

    config: GPTConfig
    notes: tuple[str, ...]
    """What the user should know about the translation."""


def read_config(raw: Mapping[str, Any], families: Mapping[str, Family], where: str) -> Reading:
    """Our configuration for a config.json, or one `MtError` naming everything in it that we do not implement."""
    family = families.get(str(raw.get("model_type")))
    if family is None:
        raise MtError(where, f"model_type is {raw.get('model_type')!r}", f"this loader reads {', '.join(families)}")
    flat = dict(raw) | _rope_values(raw)
    raise_if(Problem(where, *problem) for problem in (*_missing(family, flat), *_unsupported(family, flat)))
    values = our_values(family, flat)
    notes = _cap_to_window(family, flat, values)
    try:
        return Reading(GPTConfig.model_validate(_nested(values)), notes)
    except ValidationError as err:
        raise MtError.of(Problem(where, *_invalid(family, dict(e))) for e in err.errors()) from None


def write_config(family: Family, config: GPTConfig) -> dict[str, Any]:
    """config.json for a model that the family can carry (`cannot_carry` says nothing); for old and new transformers."""
    ours = _flat(config.model_dump())
    raw: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for path, key in family.keys.items():
        if path in ours:
            raw[key.name] = key.spelling.get(str(ours[path]), ours[path])
    if "rope_theta" in raw:
        raw["rope_parameters"] = {"rope_type": "default", "rope_theta": raw["rope_theta"]}
    return {**raw, **family.required, **({family.window[0]: None} if family.window else {})}


def cannot_carry(family: Family, config: GPTConfig) -> list[str]:
    """Our settings that would change if a model became one of the family; empty when it carries the model exactly."""
    read_back = our_values(family, write_config(family, config))
    ours = {path: value for path, value in _flat(config.model_dump()).items() if path not in NOT_SEMANTIC}
    chosen = _flat(config.model_dump(exclude_defaults=True))  # what the family does not know is fine at its default
    known = {path: value for path, value in ours.items() if path in read_back or path in chosen}
    changed = [f"{path} = {value!r}" for path, value in known.items() if read_back.get(path) != value]
    return [*changed, *family.limits(config)]


def our_values(family: Family, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Our configuration paths and values for a config.json that has every required key."""
    values = {path: value(raw) if callable(value) else value for path, value in family.always.items()}
    return values | {path: _value(key, raw) for path, key in family.keys.items()}


def _value(key: Key, raw: Mapping[str, Any]) -> Any:
    found = raw.get(key.name)
    if found is None:
        return key.default(raw) if callable(key.default) else key.default
    if not isinstance(found, str):
        return found
    return {**key.aliases, **{theirs: ours for ours, theirs in key.spelling.items()}}.get(found, found)


def _rope_values(raw: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 nests rope_theta in rope_parameters; older releases keep it at the top."""
    nested = raw.get("rope_parameters")
    return {"rope_theta": nested["rope_theta"]} if isinstance(nested, Mapping) and nested.get("rope_theta") else {}


def _missing(family: Family, raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in {key.name: key for key in family.keys.values() if key.default is REQUIRED}.values():
        value = raw.get(key.name)
        if type(value) is not int or value < 1:
            yield (
                f"{key.name} is {value!r}" if key.name in raw else f"has no {key.name}",
                "it must be a positive integer",
            )


def _unsupported(family: Family, raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("rope_scaling", "rope_parameters"):
        rope = raw.get(name) or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else rope
        if kind != "default":
            yield f"{name} asks for rope_type {kind!r}", "only 'default' is implemented"
        elif rope.get("partial_rotary_factor", 1.0) != 1.0:
            yield f"{name} rotates a part of each head", "only a partial_rotary_factor of 1 is implemented"
    for name, allowed in family.required.items():
        if raw.get(name, allowed) != allowed:
            yield f"{name} is {raw[name]!r}", f"only {allowed!r} is implemented"
    if raw.get("quantization_config"):
        yield "quantization_config: its weights are quantised", "dequantise it first, for example with transformers"


def _cap_to_window(family: Family, raw: Mapping[str, Any], values: dict[str, Any]) -> tuple[str, ...]:
    """Attention is full within the window: shorten `max_positions` to it, in place, so that the meaning is exact."""
    name, default = family.window or ("", None)
    window, positions = raw.get(name, default), values["max_positions"]
    if not window or window >= positions:
        return ()
    values["max_positions"] = window
    return (f"{name} {window} < {positions} positions: max_positions capped to {window}, where attention is full",)


def _invalid(family: Family, error: Mapping[str, Any]) -> tuple[str, str]:
    """A pydantic error under the name that the key has in config.json."""
    loc = [str(part) for part in error["loc"]]
    found = f"{error['input']!r}" if not isinstance(error["input"], Mapping) else "inconsistent values"
    for path, key in family.keys.items():
        if loc[:1] == path.split(".")[:1] and loc[-1:] == path.split(".")[-1:]:
            found = f"{key.name} is {found}"
    return found, error["msg"].removeprefix("Value error, ")


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in values.items():
        section, _, leaf = path.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[leaf] = value
    return tree


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return values
