"""Rotary positions in config.json: `rope_theta` and `rope_scaling` of old releases, `rope_parameters` of new ones."""

from collections.abc import Iterator, Mapping
from typing import Any

from mt_ckpt.huggingface.families.family import REQUIRED, Complaint, Key
from mt_models.config import Rope

FACTOR = Key("factor")
ORIGINAL = "original_max_position_embeddings"
SCALINGS: dict[str, dict[str, Key]] = {
    "linear": {"factor": FACTOR},
    "llama3": {
        "factor": FACTOR,
        "original_positions": Key(ORIGINAL),
        "low_frequency": Key("low_freq_factor"),
        "high_frequency": Key("high_freq_factor"),
    },
    "yarn": {
        "factor": FACTOR,
        "original_positions": Key(ORIGINAL, lambda raw: raw["max_position_embeddings"]),
        "beta_fast": Key("beta_fast", 32.0),
        "beta_slow": Key("beta_slow", 1.0),
        "attention_factor": Key("attention_factor", None),
        "mscale": Key("mscale", None),
        "mscale_all_dim": Key("mscale_all_dim", None),
    },
}
"""Kind of scaling to our settings and their keys."""

KNOWN = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
HARMLESS = {"truncate": True}
"""Keys that change nothing at this value."""

PLACES = ("rope_scaling", "rope_parameters")

READ = (*PLACES, "rope_theta", "partial_rotary_factor", ORIGINAL)
"""Keys of config.json that say how positions turn."""


def theta(raw: Mapping[str, Any]) -> dict[str, float]:
    """`rope_theta` where it is nested, to be put at the top."""
    nested = _given(raw).get("rope_theta")
    return {} if nested is None else {"rope_theta": nested}


def scaling(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """Our settings for how frequencies are scaled."""
    given = _given(raw)
    if not (keys := SCALINGS.get(_kind(given))):
        return None
    top = {name: raw[name] for name in ("max_position_embeddings", ORIGINAL) if raw.get(name) is not None}
    return {"kind": _kind(given), **{ours: key.read(top | given) for ours, key in keys.items()}}


def complaints(raw: Mapping[str, Any]) -> Iterator[Complaint]:
    """What is asked for and not implemented, or not understood."""
    values = {place: raw[place] for place in PLACES if raw.get(place)}
    for place, value in values.items():
        yield from _place_complaints(place, value, raw)
    kinds = {_kind(value) for value in values.values() if isinstance(value, Mapping)}
    if len(kinds) > 1:
        yield f"rope_scaling and rope_parameters disagree: {', '.join(sorted(kinds))}", "give one of them"
    if raw.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        yield f"partial_rotary_factor is {raw['partial_rotary_factor']!r}", "only 1 is implemented"


def _place_complaints(place: str, value: Any, raw: Mapping[str, Any]) -> Iterator[Complaint]:
    if not isinstance(value, Mapping):
        yield f"{place} is {value!r}", "it must be an object"
    elif any(isinstance(part, Mapping) for part in value.values()):
        yield f"{place} differs by type of layer", "only the same for all layers is implemented"
    elif value.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"{place} rotates a part of each head", "only a partial_rotary_factor of 1 is implemented"
    elif _kind(value) in SCALINGS:
        yield from _scaling_complaints(place, value, raw)
    elif _kind(value) != "default":
        yield f"{place} asks for rope_type {_kind(value)!r}", f"allowed: default, {', '.join(SCALINGS)}"


def _scaling_complaints(place: str, value: Mapping[str, Any], raw: Mapping[str, Any]) -> Iterator[Complaint]:
    keys = SCALINGS[_kind(value)]
    known = KNOWN | {key.name for key in keys.values()}
    for name in sorted(value.keys() - known):
        if value[name] is not None and HARMLESS.get(name) != value[name]:
            allowed = f"of {_kind(value)}, {', '.join(sorted(known))} are implemented"
            yield f"{place} has {name} {value[name]!r}", allowed
    for ours, value_read in (scaling({**raw, **dict.fromkeys(PLACES), place: value}) or {}).items():
        if value_read is REQUIRED:
            yield f"{place} has no {keys[ours].name}", f"{_kind(value)} needs it"


def write(position: Rope) -> dict[str, Any]:
    """Keys of config.json."""
    plain = {"rope_theta": position.theta}
    if position.scaling is None:
        return plain | {"rope_scaling": None, "rope_parameters": {"rope_type": "default", **plain}}
    ours = position.scaling.model_dump()
    keys = SCALINGS[position.scaling.kind]
    theirs = {key.name: ours[path] for path, key in keys.items() if ours[path] is not None}
    theirs["rope_type"] = position.scaling.kind
    return plain | {"rope_scaling": theirs, "rope_parameters": theirs | plain}


def _given(raw: Mapping[str, Any]) -> dict[str, Any]:
    values = [raw.get(place) for place in PLACES]
    return {name: part for value in values if isinstance(value, Mapping) for name, part in value.items()}


def _kind(given: Mapping[str, Any]) -> str:
    return str(given.get("rope_type", given.get("type", "default")))
