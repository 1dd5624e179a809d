"""What `checkpoint.init` decides of a configuration: the model, and where they are not given the tokenizer and length.

A key of the model that contradicts the checkpoint is refused with its name, unless it changes no weight and no logit.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mt_cli.run_config import drop_unset, flatten, get_table
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.config.loading import Layer, locate, merge_layers
from mt_core.config.rules import init_problems
from mt_core.contracts import CheckpointLoader
from mt_core.errors import MtError, Problem, raise_if
from mt_models.config import HEADS

HARMLESS = (
    "attention.core",
    "init_std",
    "vocab_divisor",
    "mlp.aux_loss_coeff",
    "mlp.aux_loss_scope",
    "mlp.z_loss_coeff",
    "mlp.jitter",
    "mlp.capacity_factor",
    "mlp.drop_policy",
    "mlp.pad_to_capacity",
    "*dropout*",
)
"""Patterns of keys below `model` that may differ from the checkpoint's: how it computes, and what only trains."""
LONGEST_DEFAULT = 2048
"""Longest `data.seq_length` that a checkpoint decides; its positions, if those are fewer."""


def add_checkpoint(layers: Sequence[Layer], *, announce: bool = False) -> list[Layer]:
    """The layers with those that `checkpoint.init` adds; unchanged if there is none.

    A checkpoint that cannot be read is an error only where the model is not given: a run that resumes needs it no more.
    """
    values = merge_layers(layers)
    table = get_table(values, "checkpoint")
    init, options = table.get("init"), get_table(table, "init_options")
    if not isinstance(init, str):
        return [*layers]
    try:
        raise_if(init_problems(init, options))
        if announce:
            print(f"mt: reading {init}", file=sys.stderr, flush=True)
        loader, _, path = init.partition(":")
        checkpoint = open_checkpoint(Path(path), loader, options)
        model = checkpoint.config().model_dump(mode="json")
    except MtError:
        if "layers" in get_table(values, "model"):
            return [*layers]
        raise
    raise_if(find_contradictions(layers, model, init))
    data = default_data(checkpoint, model, get_table(values, "data"))
    below, size = Layer(init, {"model": drop_unset(model), "data": data}), {"vocab_size": model["vocab_size"]}
    return [below, *layers, Layer(init, {"model": size})]  # a preset's size may be "tokenizer"


def find_contradictions(layers: Sequence[Layer], model: Mapping[str, Any], init: str) -> Iterator[Problem]:
    """Every key of a layer's model that has another value in the checkpoint's; one line for all keys of a preset.

    What a higher layer sets to another value has no effect, and is no contradiction. A model with a task's head may
    have other heads than the checkpoint.
    """
    merged = get_table(merge_layers(layers), "model")
    given, effective, for_task = dict(flatten(model)), dict(flatten(merged)), "task_head" in merged
    for layer in layers:
        differing = {
            key: value
            for key, value in flatten(get_table(layer.values, "model"))
            if effective.get(key) == value
            and not is_harmless(key, value, model)
            and not (for_task and key.partition(".")[0] in HEADS)
            and _differs(key, value, given)
        }
        if differing and layer.source.startswith("preset "):
            keys = ", ".join(differing)
            yield Problem(layer.source, f"{init} is another model, in {keys}", "leave the preset out")
            continue
        for key, value in differing.items():
            actual = f"{value!r}, but {init} has {given.get(key)!r}"
            yield Problem(
                locate([layer], ["model", *key.split(".")]), actual, "leave it out: the checkpoint decides it"
            )


def is_harmless(key: str, value: object, model: Mapping[str, Any]) -> bool:
    """Whether a key below `model` may differ from the checkpoint's."""
    if key == "max_seq_len":  # positions that are no weights
        return get_table(model, "position").get("kind") in ("rope", "none")
    if key.startswith("lora."):  # fresh adapters; those of the checkpoint have their size
        return model.get("lora") is None
    return (key, value) == ("vocab_size", "tokenizer") or any(fnmatch(key, pattern) for pattern in HARMLESS)


def _differs(key: str, value: object, given: Mapping[str, Any]) -> bool:
    """Whether the checkpoint's value is another one; an unknown key is left to the check of all keys."""
    parts = key.split(".")
    parents = (".".join(parts[:length]) for length in range(1, len(parts)))
    if any(given.get(parent, "") is None for parent in parents):  # a table that the checkpoint has not got
        return True
    return key in given and given[key] != value


def default_data(checkpoint: CheckpointLoader, model: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the data section where none are given: the length, and a tokenizer for data that needs one.

    Corpora of tokens need none: all files of the checkpoint's own are copied for them.
    """
    length = min(int(model["max_seq_len"]), LONGEST_DEFAULT)
    defaults: dict[str, Any] = {"kind": data.get("kind", "gpt"), "seq_length": length}
    files = list(checkpoint.tokenizer_files())
    if files and data.get("kind", "gpt") not in ("gpt", "mock") and "tokenizer" not in data:
        from mt_data.tokenizers.build import detect_tokenizer

        with suppress(MtError):  # files that are no tokenizer; the data says that it needs one
            defaults["tokenizer"] = detect_tokenizer(files[0].parent).model_dump(exclude_defaults=True)
            defaults["tokenizer"].setdefault("type", "GPT2BPETokenizer")
    return defaults
