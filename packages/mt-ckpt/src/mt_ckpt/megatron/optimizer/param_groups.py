"""Parameter groups of Megatron's optimizers: which parameter is in which, by the settings that tell groups apart."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mt_ckpt.megatron.optimizer.param_order import is_expert_parameter
from mt_ckpt.megatron.parameters.names import EMBED, HEAD
from mt_core.errors import MtError

Values = Mapping[str, Any]
APART = "is_expert_parallel"


def find_group(name: str, dims: int, groups: Sequence[Values]) -> int:
    """The number of a parameter's group: biases and vectors do not decay; embeddings may have a rate of their own."""
    decays = 0.0 if dims == 1 or name.endswith(".bias") else 1.0
    decoupled = any(group.get("is_decoupled_lr") for group in groups) and name in (EMBED, HEAD)
    apart = any(group.get(APART) for group in groups) and is_expert_parameter(name)
    for number, group in enumerate(groups):
        settings = group.get("wd_mult", 1.0), bool(group.get("is_decoupled_lr")), bool(group.get(APART))
        if settings == (decays, decoupled, apart):
            return number
    raise MtError(name, f"none of the {len(groups)} parameter groups is for it", "the checkpoint cannot be read")


def number_parameters(
    dims: Mapping[str, int], groups: Sequence[Values], where: str
) -> Iterator[tuple[str, int, int, Any]]:
    """Name, group, place there and id of each parameter; `dims`, by "chunk name", are in Megatron's order."""
    counts = [0] * len(groups)
    ids = [list(group["params"]) for group in groups]
    for name, dim in dims.items():
        group = find_group(name.rpartition(" ")[2], dim, groups)
        if counts[group] == len(ids[group]):
            raise MtError(where, f"parameter group {group} has only {counts[group]} parameters", "copy it again")
        yield name, group, counts[group], ids[group][counts[group]]
        counts[group] += 1


def assign_groups(dims: Mapping[str, int], groups: Sequence[Values]) -> list[list[str]]:
    """The parameters of each group; `dims` are as above."""
    members: list[list[str]] = [[] for _ in groups]
    for name, dim in dims.items():
        members[find_group(name.rpartition(" ")[2], dim, groups)].append(name)
    return members


def with_ids(groups: Sequence[Values], members: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Groups as torch's optimizers save them: ids count through the groups (docs/specs/checkpoints.md §1.4)."""
    ids = itertools.count()
    return [{**group, "params": [next(ids) for _ in own]} for group, own in zip(groups, members, strict=True)]


def for_experts(groups: Sequence[Values]) -> list[Values]:
    """The group of the experts' optimizer for those of the others': experts are matrices, which decay."""
    return [
        {**group, APART: True}
        for group in groups
        if group.get("wd_mult", 1.0) == 1.0 and not group.get("is_decoupled_lr")
    ]


def without_params(group: Values) -> dict[str, Any]:
    """A group without its parameters."""
    return {key: value for key, value in group.items() if key != "params"}


def count_steps(groups: Sequence[Values], states: Sequence[Values] = ()) -> int | None:
    """The optimizer's steps, which the group has or every parameter."""
    counts = [values["step"] for values in (*groups, *states) if values.get("step") is not None]
    return max((int(value) for value in counts), default=None)
