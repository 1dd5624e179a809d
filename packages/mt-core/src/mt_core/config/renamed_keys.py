"""Configuration keys that were renamed: what a user wrote is refused with the new name, what mt saved is translated.

Files of settings and `--set` never take an old key. Checkpoints written before the renames stay readable:
`mt_core.checkpoint.native` passes the configuration in their meta.json through `translate`.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

RENAMED = {
    "model.model_size": "model.hidden_size",
    "model.max_positions": "model.max_seq_len",
    "model.attention.kv_groups": "model.attention.num_kv_heads",
    "model.mlp.size": "model.mlp.ffn_hidden_size",
    "model.mlp.balance": "model.mlp.aux_loss_coeff",
    "parallel.context_exchange": "parallel.cp_comm_type",
    "schedule.steps": "train.steps",
    "schedule.eval_every": "train.eval_every",
    "schedule.eval_batches": "train.eval_batches",
    "schedule.warmup_steps": "lr_schedule.warmup_steps",
    "schedule.decay": "lr_schedule.decay",
    "schedule.decay_steps": "lr_schedule.decay_steps",
    "schedule.min_lr": "lr_schedule.min_lr",
    "schedule.anneal_steps": "lr_schedule.anneal_steps",
    "schedule.anneal": "lr_schedule.anneal",
}
"""Old dotted key → the key since; all were renamed before the first release."""

MODEL_KINDS = ("gpt", "bert", "t5")
"""Kinds of models whose keys were renamed; another package's model may have fields of the old names."""


def find_renamed(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every old key that `values` has, with its new name."""
    for old, new in RENAMED.items():
        section, key = _parent(values, old)
        if section is not None and key in section and _applies(values, old):
            yield old, new


def translate(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `values` with old keys under their new names; a new key that is there as well wins."""
    translated = deepcopy(dict(values))
    for old, new in find_renamed(values):
        section, key = _parent(translated, old)
        value = section.pop(key)
        translated.setdefault(new.split(".")[0], {})
        target, key = _parent(translated, new)
        target.setdefault(key, value)
        if not translated[old.split(".")[0]]:
            del translated[old.split(".")[0]]
    return translated


def _parent(values: Mapping[str, Any], path: str) -> tuple[Any, str]:
    """The table that a dotted key would be in, None if there is none, and the key's last part."""
    *names, key = path.split(".")
    table: Any = values
    for name in names:
        table = table.get(name) if isinstance(table, Mapping) else None
    return (table if isinstance(table, Mapping) else None), key


def _applies(values: Mapping[str, Any], old: str) -> bool:
    return not old.startswith("model.") or values["model"].get("kind", "gpt") in MODEL_KINDS
