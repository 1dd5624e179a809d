"""Going on from a checkpoint: what has changed since, what must not, and which samples are wanted now.

A run's position is the number of samples that it has consumed. It means what it meant only while the order of the
samples stays, so settings that would change it are refused, and asking for more samples leaves those planned alone.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mt_cli.run_config import FullConfig, differences, flatten
from mt_core.checkpoint.native import read_meta, steps
from mt_core.config.loading import model_config
from mt_core.config.sections import BatchConfig, Section
from mt_core.errors import MtError, Problem
from mt_data.batching.batch_sizes import count_samples, make_batch_sizes
from mt_data.config import BUILTIN_SECTIONS

PLANNED, DATA_RANKS = "planned_samples", "data_ranks"
"""Keys of a checkpoint's meta.json: numbers of samples that the run wanted, and ranks that took different ones."""
SAME_SAMPLES = frozenset(
    {
        *("cache_dir", "loader_workers", "prefetch", "tokenizer", "valid_paths", "test_paths", "keep_partial_valid"),
        *("eod_mask_loss", "reset_position_ids", "reset_attention_mask", "inter_document_masking"),
        *("mask_prob", "max_ngram", "full_words", "longer_ngrams", "geometric", "permute", "decoder_seq_length"),
        *("rate", "spm_rate", "fragment_rate", "split_token", "no_prefix", "query_in_block_prob"),
        *("prefix_token", "middle_token", "suffix_token", "pad_token", "eod_token"),
        *("prompt_format", "chat_template", "conversation_multiple", "max_untrained"),
    }
)
"""Fields of the data section that do not decide which text sample i is made of; all others do, or may."""
COUNTED = frozenset({"tokenizer", "prompt_format", "chat_template", "conversation_multiple"})
"""Those of them on which the lengths of conversations depend, which decide where `data.pack_lines` is on."""
ALLOW_CHANGE = "--allow-change"


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """The latest checkpoint of a run directory, as far as its meta.json tells."""

    path: Path
    step: int
    samples: int
    """Samples that the run has consumed."""
    config: Mapping[str, Any]
    """Sections of the run that wrote it, in today's keys; one that was converted may lack some."""
    planned: tuple[int, ...]
    """Numbers of samples that the run wanted so far, each larger than the one before; empty if it does not tell."""
    data_ranks: int | None


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that differs from that of the checkpoint."""

    key: str
    old: Any
    new: Any
    recorded: bool = True
    """Whether the checkpoint tells the old value; one of an older version, or converted, may not."""

    def __str__(self) -> str:
        return f"{self.key}: {_format(self.old)} → {_format(self.new)}"


def find_resume_point(run_dir: Path) -> ResumePoint | None:
    """The checkpoint that a run in this directory goes on from; None if there is none."""
    if not (committed := steps(run_dir)):
        return None
    meta = read_meta(committed[-1])
    model = model_config(meta["config"]["model"]).model_dump(mode="json")  # fields newer than the run: defaults
    config, planned = meta["config"] | {"model": model}, tuple(meta.get(PLANNED, ()))
    return ResumePoint(committed[-1], meta["step"], meta["samples"], config, planned, meta.get(DATA_RANKS))


def list_changes(point: ResumePoint, config: FullConfig) -> list[Change]:
    """Every setting that differs from the checkpoint's; one that it does not tell counts if it is not the default."""
    now = {name: value for name, value in config.model_dump(mode="json").items() if name in point.config}
    recorded = dict(flatten(point.config))
    changes = [Change(key, old, new, key in recorded) for key, old, new in differences(point.config, now)]
    return [
        change
        for change in changes
        if change.key != "runtime.run_dir" and (change.recorded or not _is_default(config, change))
    ]


def change_problems(point: ResumePoint, config: FullConfig, data_ranks: int, *, allow: bool) -> Iterator[Problem]:
    """Changes that cannot be made, and those that would repeat or skip data unless that is allowed."""
    if not config.checkpoint.resume:
        yield Problem(
            str(point.path.parent), f"has a checkpoint, {point.path.name}", "resume it, or choose another run_dir"
        )
        return
    for change in list_changes(point, config):
        if change.key.startswith("model."):
            actual = f"{change.new}, but {point.path} has {change.old}"
            yield Problem(change.key, actual, "keep it, or choose another run_dir")
        elif not allow and reorders_samples(change, config):
            yield _refuse(change, point)
    if not allow and _is_cyclic(config) and point.data_ranks not in (None, data_ranks):
        yield _refuse(Change("data-parallel ranks", point.data_ranks, data_ranks), point)


def reorders_samples(change: Change, config: FullConfig) -> bool:
    """Whether a change gives the samples after the run's position another order or other text."""
    section, _, field = change.key.partition(".")
    if not change.recorded:
        return False
    if section == "data":
        name = field.partition(".")[0]
        return name not in SAME_SAMPLES or (name in COUNTED and getattr(config.data, "pack_lines", False))
    return change.key == "runtime.seed" or (change.key == "batch.micro_batch" and _is_cyclic(config))


def _refuse(change: Change, point: ResumePoint) -> Problem:
    actual = f"{_format(change.old)} → {_format(change.new)} gives the samples another order or other text"
    allowed = f"keep it, choose another runtime.run_dir, or go on at sample {point.samples} of the new order with "
    return Problem(change.key, f"{actual}: some would be repeated, others skipped", f"{allowed}{ALLOW_CHANGE}")


def plan_samples(point: ResumePoint | None, config: FullConfig, *, allow: bool) -> tuple[int, ...]:
    """Numbers of training samples that the run has wanted, up to what it wants now.

    The last is added only if the plan before does not reach. With an order that was given up (`allow`) a new plan
    begins; cyclic orders have no end, and stay with the dataset that they began with.
    """
    sizes = make_batch_sizes(config.batch)
    if point is None:
        return (count_samples(sizes, config.train.steps),)
    wanted = count_samples(sizes, max(0, config.train.steps - point.step), consumed=point.samples)
    before = point.planned or _derive_plan(point.config)
    reordered = any(reorders_samples(change, config) for change in list_changes(point, config))
    if not before or (allow and reordered):
        return (wanted,)
    if _is_cyclic(config) or wanted <= before[-1]:
        return before
    if not isinstance(config.data, BUILTIN_SECTIONS) and not getattr(config.data, "order_is_fixed", False):
        if allow:
            return (wanted,)
        actual = f"wants {wanted} samples, planned were {before[-1]}; mt cannot know whether their order stays"
        raise MtError("train.steps", f"{actual} for data of kind {config.data.kind!r}", f"fewer, or {ALLOW_CHANGE}")
    return (*before, wanted)


def _derive_plan(saved: Mapping[str, Any]) -> tuple[int, ...]:
    """The plan of a checkpoint from before plans were saved, from its configuration; none if that lacks sections."""
    if not {"batch", "train"} <= saved.keys():
        return ()
    return (count_samples(make_batch_sizes(BatchConfig.model_validate(saved["batch"])), saved["train"]["steps"]),)


def _is_cyclic(config: FullConfig) -> bool:
    return config.data.order != "single"


def _is_default(config: FullConfig, change: Change) -> bool:
    """Whether a setting has its default; a field of no section, as in a free table, never does."""
    *path, field = change.key.split(".")
    section: Any = config
    for name in path:
        section = getattr(section, name, None)
    if not isinstance(section, Section) or field not in type(section).model_fields:
        return False
    default = type(section).model_fields[field].get_default(call_default_factory=True)
    return change.new == json.loads(json.dumps(default, default=str))


def _format(value: object) -> str:
    return "unset" if value is None else json.dumps(value, ensure_ascii=False)
