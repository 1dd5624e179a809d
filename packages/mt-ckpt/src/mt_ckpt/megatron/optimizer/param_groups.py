"""Which of Megatron's optimizers has a parameter, and in which of its parameter groups."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.parameters.names import OUTPUT_LAYER, WORD_EMBEDDINGS
from mt_ckpt.megatron.parameters.pipeline import layer_locations
from mt_ckpt.megatron.parameters.table import is_tied
from mt_core.errors import MtError, Problem
from mt_models.config import TransformerConfig

Values = Mapping[str, Any]
APART = "is_expert_parallel"

T = TypeVar("T")


def by_optimizer(parameters: Mapping[str, T], expert_ranks: int) -> list[dict[str, T]]:
    """The parameters of each optimizer: where several ranks share the experts, these have one of their own.

    Source: docs/specs/checkpoints.md §1.4.
    """
    if expert_ranks == 1:
        return [dict(parameters)]
    return [
        {name: value for name, value in parameters.items() if is_expert_parameter(name) == experts}
        for experts in (False, True)
    ]


def list_stages_without_experts(config: TransformerConfig, layout: Layout, where: str) -> Iterator[Problem]:
    """The stages whose layers are all before the first experts, where ranks share these.

    There the experts' optimizer has no parameters, and which optimizers Megatron then saves is in no specification.
    """
    if layout.expert == 1 or config.mlp.kind != "moe" or not config.mlp.dense_layers:
        return
    locations = layer_locations(config.layers, layout.pipeline, layout.virtual)
    with_experts = {(stage, chunk) for stage, chunk, _ in locations[config.mlp.dense_layers :]}
    for stage, chunk in sorted({(stage, chunk) for stage, chunk, _ in locations} - with_experts):
        of_chunk = f", chunk {chunk}" if layout.virtual > 1 else ""
        problem = f"pipeline stage {stage}{of_chunk} has no experts, which {layout.expert} ranks share elsewhere"
        yield Problem(where, problem, "fewer stages or one expert rank; or mt ckpt convert, which moves weights alone")


def is_expert_parameter(name: str) -> bool:
    """Whether a name of Megatron's is that of an expert's tensor."""
    return ".mlp.experts." in name


def tied_across_stages(config: TransformerConfig, stages: int) -> tuple[str, ...]:
    """Names that have a bucket of their own: a tied embedding and its copy on another stage."""
    return (WORD_EMBEDDINGS, OUTPUT_LAYER) if is_tied(config) and stages > 1 else ()


def find_group(name: str, dims: int, groups: Sequence[Values]) -> int:
    """The number of a parameter's group: biases and vectors do not decay; embeddings may have a rate of their own."""
    decays = 0.0 if dims == 1 or name.endswith(".bias") else 1.0
    decoupled = any(group.get("is_decoupled_lr") for group in groups) and name in (WORD_EMBEDDINGS, OUTPUT_LAYER)
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
    return [{**group, "params": [next(ids) for _ in names]} for group, names in zip(groups, members, strict=True)]


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
