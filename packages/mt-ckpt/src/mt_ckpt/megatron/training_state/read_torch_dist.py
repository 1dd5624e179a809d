"""The training state of a Megatron-Core checkpoint in `torch_dist` format, however its optimizer is stored."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mt_ckpt.megatron.dist_format.metadata import Stored
from mt_ckpt.megatron.dist_format.reader import DistFiles
from mt_ckpt.megatron.optimizer import KINDS, MASTER, MOMENTS, dp_reshardable
from mt_ckpt.megatron.optimizer.fully_sharded_model_space import unflatten_all
from mt_ckpt.megatron.optimizer.param_groups import count_steps, list_stages_without_experts
from mt_ckpt.megatron.parameters.names import list_parameters, second_names
from mt_ckpt.megatron.placement import place_parameters
from mt_ckpt.megatron.training_state.common_state import common_state, layout_from_args, read_config
from mt_ckpt.megatron.training_state.state import RandomStates, Stream, TrainingState, drop_buffers
from mt_core.errors import MtError, raise_if
from mt_models.config import TransformerConfig

CHAINED = re.compile(r"^chained_\d+\.")
KEYS = {
    MASTER: ("optimizer.state.param.", "optimizer.state.fp32_param."),
    "exp_avg": ("optimizer.state.exp_avg.",),
    "exp_avg_sq": ("optimizer.state.exp_avg_sq.",),
}
"""Prefixes of the model's keys: main's, then 0.11's."""
GROUPS = re.compile(r"(chained_\d+\.)?optimizer\.distributed\.dp_group_idx_\d+\..*optimizer/shard_0_1")
"""Objects that hold the parameter groups, of each optimizer, where the common state does not."""
RANDOM = re.compile(r"rng_state/shard_(\d+)\.(\d+)_(\d+)\.(\d+)")


def read_torch_dist(
    directory: Path,
    tensor: int | None = None,
    true_vocab_size: int | None = None,
    given: Mapping[str, Any] = MappingProxyType({}),
) -> TrainingState:
    """One iteration; for a target of Megatron's with `tensor` ranks, padding is kept.

    `given` arguments of Megatron's go before those of the files.
    """
    files = DistFiles(directory, given=given)
    config = read_config(files, tensor, true_vocab_size)
    objects = {match[1]: stored for key, stored in files.stored.items() if (match := GROUPS.fullmatch(key))}
    groups, counts = _groups(
        [files.common.get("optimizer"), *(stored.chunks[0].read() for stored in objects.values())], directory
    )
    common = {**files.common, "args": files.args}

    def weights() -> Any:
        return files.tensors(config)

    return TrainingState(
        weights=weights,
        optimizer={MASTER: drop_buffers(weights), **_optimizer(files, config)},
        random=_random(files.stored),
        **common_state(directory, config, common, groups, count_steps(groups, counts)),
    )


def _optimizer(files: DistFiles, config: TransformerConfig) -> dict[str, Stream]:
    if any(dp_reshardable.KEY.fullmatch(key) for key in files.stored):
        return _buckets(files, config)
    stored = {CHAINED.sub("", key): tensor for key, tensor in files.stored.items()}
    streams: dict[str, Stream] = {}
    for kind, prefixes in KEYS.items():
        named = {key[len(p) :]: tensor for p in prefixes for key, tensor in stored.items() if key.startswith(p)}
        if named:
            whole = unflatten_all(_by_first_names(named, config), stored)
            streams[kind] = partial(files.holding(whole).tensors, config)
    if missing := [kind for kind in KINDS if kind not in streams and kind != MASTER]:
        others = sorted({key.partition("optimizer.")[2].partition(".")[0] for key in stored if "optimizer." in key})
        problem = f"holds no {' and no '.join(missing)}" + (
            f", but optimizer.{{{', '.join(others)}}}" if others else ""
        )
        allowed = "layouts that can be read: fully_sharded_model_space, fully_reshardable, dp_reshardable, unsharded"
        raise MtError(str(files.path), problem, allowed)
    return streams


def _by_first_names(named: Mapping[str, Stored], config: TransformerConfig) -> dict[str, Stored]:
    """With the first name of a parameter that has two, of which an optimizer knows one: the last."""
    copies = {copy: name for name in list_parameters(config) for copy in second_names(config, name)}
    return {**{copies[copy]: stored for copy, stored in named.items() if copy in copies}, **named}


def _buckets(files: DistFiles, config: TransformerConfig) -> dict[str, Stream]:
    args = vars(files.args)
    layout = layout_from_args(args)
    raise_if(list_stages_without_experts(config, layout, str(files.path)))
    placement = place_parameters(config, layout, args["padded_vocab_size"])
    streams: dict[str, Stream] = {}
    for kind, key in ((MASTER, "param"), *((kind, kind) for kind in MOMENTS)):
        slots = dp_reshardable.locate_parameters(files.stored, key, placement, args)
        streams[kind] = partial(dp_reshardable.tensors, slots, placement)
    return streams


def _groups(optimizer: Any, where: Path) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Parameter groups of all optimizers, and their counts of steps outside groups."""
    groups: list[Mapping[str, Any]] = []
    counts: list[Mapping[str, Any]] = []

    def search(value: Any) -> None:
        if isinstance(value, Mapping):
            if isinstance(value.get("param_groups"), list):
                groups.extend(value["param_groups"])
            if value.get("common_step") is not None:
                counts.append({"step": value["common_step"]})
            for inner in value.values():
                search(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                search(inner)

    search(optimizer)
    if not groups:
        raise MtError(str(where), "holds no optimizer (--no-save-optim?)", "use mt ckpt convert for the weights")
    return groups, counts


def _random(stored: Mapping[str, Stored]) -> RandomStates | None:
    states: dict[tuple[int, int], Any] = {}
    sizes = (1, 1)
    for key, record in stored.items():
        if match := RANDOM.fullmatch(key):
            stage, rank, *sizes = map(int, match.groups())
            states[stage, rank] = record.chunks[0].read()[0]
    return RandomStates(sizes[1], sizes[0], states) if states else None
