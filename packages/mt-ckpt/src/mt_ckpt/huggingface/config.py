"""Between config.json of a Hugging Face family and a model's configuration, driven by the family's tables.

Reading refuses what the file asks for and we do not compute, all of it at once. Writing is checked by reading back.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from mt_ckpt.huggingface.families import rope, windows
from mt_ckpt.huggingface.families.family import REQUIRED, Complaint, Config, Family
from mt_ckpt.huggingface.families.ignored_keys import list_unread
from mt_core.errors import MtError, Problem, raise_if
from mt_models.config import GPTConfig

DROPOUT = {f"dropout.{part}" for part in ("attention", "hidden", "embedding")}
"""Rates that only training reads; a family carries those that it has keys for."""
ROUTER = {
    f"mlp.{setting}"
    for setting in (
        *("aux_loss_coeff", "aux_loss_scope", "z_loss_coeff", "jitter"),
        *("capacity_factor", "drop_policy", "pad_to_capacity"),
    )
}
"""Settings of a router that only training reads."""
NOT_SEMANTIC = {"kind", "attention.core", "vocab_divisor", *ROUTER, *DROPOUT}
"""Our settings that say how to compute or train, not what a model is; what a format does not carry of them is lost."""


def read_config(
    raw: Mapping[str, Any], families: Mapping[str, Family], where: str, names: Iterable[str] = ()
) -> Config:
    """Our configuration for a config.json, or one `MtError` naming everything in it that we do not implement.

    `names` are those of the stored tensors, from which a BERT's heads are known.
    """
    family = families.get(str(raw.get("model_type")))
    if family is None:
        raise MtError(where, f"model_type is {raw.get('model_type')!r}", f"this loader reads {', '.join(families)}")
    flat = dict(raw) | rope.theta(raw)
    missing = [*_missing(family, flat)]
    complaints = [*missing, *_unsupported(family, flat)]
    if not missing:
        complaints += _window_complaints(family, flat) or _invalid_values(family, flat)
    raise_if(Problem(where, *complaint) for complaint in complaints)
    from_names = {path: value(flat, frozenset(names)) for path, value in family.from_tensor_names.items()}
    return family.config.model_validate(_nested(_without_idle_window(our_values(family, flat) | from_names)))


def write_config(family: Family, config: Config) -> dict[str, Any]:
    """config.json for a model that the family can carry (`find_lost_settings` is empty); old and new releases of
    transformers read it."""
    ours = _flat(config.model_dump())
    raw: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for path, key in family.keys.items():
        if path in ours:
            raw[key.name] = key.write(ours[path])
    if isinstance(config, GPTConfig) and config.position.kind == "rope" and "position.theta" in family.keys:
        raw |= rope.write(config.position)
    if family.window and isinstance(config, GPTConfig):
        raw |= family.window.write(config)
    return {**raw, **dict(family.also_written(config)), **family.required}


def find_lost_settings(family: Family, config: Config) -> list[str]:
    """Our settings that would change if a model became one of the family; empty when it carries the model exactly."""
    read_back = our_values(family, write_config(family, config))
    ours = {path: value for path, value in _flat(config.model_dump()).items() if path not in NOT_SEMANTIC}
    ours |= _said_otherwise(config) if isinstance(config, GPTConfig) else {}
    chosen = _flat(config.model_dump(exclude_defaults=True))  # what the family does not know is fine at its default
    known = {
        path: value
        for path, value in ours.items()
        if path.partition(".")[0] not in family.from_tensor_names and (path in read_back or path in chosen)
    }
    changed = [f"{path} = {value!r}" for path, value in known.items() if read_back.get(path) != value]
    return [*changed, *family.limits(config)]


def _said_otherwise(config: GPTConfig) -> dict[str, Any]:
    """Settings that can say the same in two ways, in the way in which `our_values` says it."""
    part, same = config.attention, {}
    if part.window:
        same["attention.window_layers"] = windows.pattern(windows.get_window_flags(config))
    if part.kind == "mla" and part.norm_eps == config.norm.eps:
        same["attention.norm_eps"] = None
    if config.mlp.kind == "moe" and config.mlp.top_groups == config.mlp.groups:
        same["mlp.top_groups"] = None
    if part.kind == "gqa" and part.scale == part.head_size**-0.5:
        same["attention.scale"] = None
    return same


def our_values(family: Family, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Our configuration paths and values for a config.json that has every required key."""
    values = {path: value(raw) if callable(value) else value for path, value in family.always.items()}
    values |= {path: key.read(raw) for path, key in family.keys.items()}
    return values | (family.window.read(raw) if family.window else {})


def _missing(family: Family, raw: Mapping[str, Any]) -> Iterator[Complaint]:
    for key in {key.name: key for key in family.keys.values() if key.default is REQUIRED}.values():
        value = key.read(raw)
        if type(value) is not int or value < 1:
            yield (
                f"{key.name} is {value!r}" if value is not REQUIRED else f"has no {key.name}",
                "it must be a positive integer",
            )


def _unsupported(family: Family, raw: Mapping[str, Any]) -> Iterator[Complaint]:
    if "position.theta" in family.keys:
        yield from rope.complaints(raw)
    for name, allowed in family.required.items():
        if raw.get(name, allowed) != allowed and (raw[name] is not None or allowed):  # null is false and empty
            yield f"{name} is {raw[name]!r}", f"only {allowed!r} is implemented"
    yield from family.complaints(raw)
    yield from list_unread(raw, _read_keys(family), family.ignored, family.model_type)
    if raw.get("quantization_config"):
        yield "quantization_config: its weights are quantised", "dequantise it first, for example with transformers"


def _read_keys(family: Family) -> tuple[str, ...]:
    """Keys of config.json that the tables of a family read."""
    names = [name for key in family.keys.values() for name in (key.name, *key.also)]
    turned = rope.READ if "position.theta" in family.keys else ()
    window = family.window.keys if family.window else ()
    return ("model_type", "quantization_config", *names, *family.required, *family.also_read, *turned, *window)


def _window_complaints(family: Family, raw: Mapping[str, Any]) -> list[Complaint]:
    return [*family.window.complaints(raw)] if family.window else []


def _invalid_values(family: Family, raw: Mapping[str, Any]) -> list[Complaint]:
    """What pydantic finds wrong with our values for a config.json; what `rope.complaints` reports is left out."""
    values = {path: value for path, value in our_values(family, raw).items() if value is not REQUIRED}
    if rope.scaling(raw) and [*rope.complaints(raw)]:
        del values["position.scaling"]
    try:
        family.config.model_validate(_nested(values))
    except ValidationError as err:
        return [_invalid(family, dict(error)) for error in err.errors()]
    return []


def _without_idle_window(values: dict[str, Any]) -> dict[str, Any]:
    """A window as long as the longest sequence changes nothing, and only keeps fast kernels away."""
    if (values.get("attention.window") or 0) >= values["max_seq_len"]:
        return values | {"attention.window": None, "attention.window_layers": None}
    return values


def _invalid(family: Family, error: Mapping[str, Any]) -> tuple[str, str]:
    """A pydantic error under the name that the key has in config.json."""
    loc = [str(part) for part in error["loc"]]
    problem = "inconsistent values" if isinstance(error["input"], Mapping) else f"{loc[-1]} is {error['input']!r}"
    for path, key in family.keys.items():
        if loc[:1] == path.split(".")[:1] and loc[-1:] == path.split(".")[-1:]:
            problem = f"{key.name} is {error['input']!r}"
    return problem, error["msg"].removeprefix("Value error, ")


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
