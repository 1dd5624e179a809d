"""The number of ranks along each axis, and the coordinates of each rank. Torch-free.

This is the only place that knows the order of ranks: whoever needs a rank's coordinates, or the ranks that differ along
one axis alone, asks `ParallelDims`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from math import lcm, prod

from mt_core.config.sections import ParallelConfig
from mt_core.errors import MtError

AXES = ("pipeline", "data", "context", "tensor")
"""The axes of a configuration, outermost first: neighbouring ranks differ along `tensor` (docs/specs/core.md §1.1)."""
VIEWS = (
    AXES,
    ("pipeline", "data_context", "tensor"),
    ("pipeline", "replica", "shard", "tensor"),
    ("pipeline", "expert_data_parallel", "expert", "tensor"),
    ("pipeline", "expert_data_parallel", "expert_parts"),
    ("pipeline", "expert_replica", "expert_shard", "expert", "tensor"),
)
"""The ways to count the same ranks as a grid, outermost axis first; an axis means the same in every view."""


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of the axes; those of pipeline, data, context and tensor multiply to the number of ranks."""

    data: int = 1
    context: int = 1
    tensor: int = 1
    shard: int | None = None
    """Ranks of data × context that share one copy of the sharded state; None for all of them."""
    expert: int = 1
    """Neighbours on data × context that share each layer's experts."""
    pipeline: int = 1
    """Groups of ranks that have different layers."""
    whole_experts: bool = False
    """Tensor ranks have whole experts, instead of sharing each."""

    @property
    def ranks(self) -> int:
        """Ranks of the whole run."""
        return self.pipeline * self.stage_ranks

    @property
    def stage_ranks(self) -> int:
        """Ranks that have the same layers: neighbours, since the pipeline is the outermost axis."""
        return self.data * self.context * self.tensor

    @property
    def data_context(self) -> int:
        """Ranks with the same part of the dense weights, which see different tokens."""
        return self.data * self.context

    @property
    def shard_group_size(self) -> int:
        """Ranks that share one copy of the sharded state."""
        return self.shard or self.data_context

    @property
    def expert_tensor(self) -> int:
        """Tensor ranks that share each expert's matrices."""
        return 1 if self.whole_experts else self.tensor

    @property
    def expert_shard_group_size(self) -> int:
        """Ranks that share one copy of the sharded state of the experts that all of them hold.

        If a shard group is made of whole expert groups, it is the number of those; otherwise the smallest number of
        ranks whose expert groups fill whole shard groups.
        """
        return lcm(self.shard_group_size, self.expert) // self.expert

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """The number of ranks along every axis of `VIEWS`."""
        expert_data_parallel = self.data_context // self.expert
        return {
            "pipeline": self.pipeline,
            "data": self.data,
            "context": self.context,
            "tensor": self.tensor,
            "data_context": self.data_context,
            "shard": self.shard_group_size,
            "replica": self.data_context // self.shard_group_size,
            "expert": self.expert,
            "expert_parts": self.expert * self.tensor,
            "expert_data_parallel": expert_data_parallel,
            "expert_shard": self.expert_shard_group_size,
            "expert_replica": expert_data_parallel // self.expert_shard_group_size,
        }

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return a rank's position along every axis of `VIEWS`."""
        positions: dict[str, int] = {}
        for view in VIEWS:
            outer = rank
            for axis in reversed(view):
                outer, positions[axis] = divmod(outer, self.sizes[axis])
        return positions

    def groups(self, axis: str) -> list[list[int]]:
        """List every set of ranks that differ along `axis` alone, each in the order of their positions on it.

        Ranks of one `shard` group share one copy of the sharded state, those of one `replica` group hold the same part
        of it; an `expert` group holds different experts of the same layers, an `expert_data_parallel` group the same
        experts, whose state it shares along `expert_shard` and repeats along `expert_replica`; an `expert_parts` group
        has all experts between its ranks where tensor ranks share each.
        """
        others = [other for other in _view(axis) if other != axis]
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.ranks):
            positions = self.coordinates(rank)
            groups.setdefault(tuple(positions[other] for other in others), []).append(rank)
        return [*groups.values()]

    def group(self, axis: str, rank: int) -> list[int]:
        """Return the group of `groups(axis)` that a rank belongs to."""
        return next(group for group in self.groups(axis) if rank in group)

    def span(self, axis: str) -> int:
        """Return how many consecutive ranks a group of `axis` reaches over, from its first rank to the next group."""
        inner = takewhile(lambda other: other != axis, reversed(_view(axis)))
        return self.sizes[axis] * prod(self.sizes[other] for other in inner)


def split_group(ranks: Sequence[int], size: int) -> list[list[int]]:
    """Split a group of ranks into groups of `size` neighbours."""
    return [[*ranks[start : start + size]] for start in range(0, len(ranks), size)]


def _view(axis: str) -> tuple[str, ...]:
    return next(view for view in VIEWS if axis in view)


def resolve_dims(config: ParallelConfig, ranks: int) -> ParallelDims:
    """Return the sizes that a configuration means for a number of ranks; raise `MtError` if they do not fit."""
    model = config.tensor * config.context * config.pipeline
    axes = f"tensor {config.tensor} × context {config.context}"
    axes += f" × pipeline {config.pipeline}" if config.pipeline > 1 else ""
    if config.data is None and ranks % model:
        number = "three" if config.pipeline > 1 else "two"
        allowed = f"start {-(-ranks // model) * model} ranks, or change one of the {number}"
        raise MtError("parallel", f"{axes} does not divide {ranks} ranks", allowed)
    data = config.data or ranks // model
    if data * model != ranks:
        product = f"{axes} × data {data} = {data * model}"
        raise MtError(
            "parallel.data", f"{product}, but {ranks} ranks run", f"start {data * model} ranks, or leave data unset"
        )
    data_context = data * config.context
    shard = {"replicate": 1, "zero1": config.shard_size, "fsdp": config.shard_size}[config.sharding]
    if problem := find_expert_tensor_problem(config):
        raise MtError(*problem)
    for field, size in (("shard_size", shard or 1), ("expert", config.expert)):
        if data_context % size:
            reason = f"{size} does not divide data × context = {data_context}"
            divisors = ", ".join(str(n) for n in range(1, data_context + 1) if data_context % n == 0)
            raise MtError(f"parallel.{field}", reason, f"allowed: {divisors}")
    whole = config.expert_tensor == 1 < config.tensor
    return ParallelDims(data, config.context, config.tensor, shard, config.expert, config.pipeline, whole)


def find_expert_tensor_problem(config: ParallelConfig) -> tuple[str, str, str] | None:
    """Say why experts cannot be shared among as many tensor ranks as a configuration asks for."""
    if config.expert_tensor in (None, 1, config.tensor):
        return None
    few, tensor = config.expert_tensor, config.tensor
    reason = f"{few}, but parallel.tensor is {tensor}, and ranks with different tokens share no expert"
    if few < tensor:
        reason = f"{few} of {tensor} tensor ranks: all share each expert, or none does"
    fits = "1" if tensor == 1 else f"1 or {tensor}"
    return "parallel.expert_tensor", reason, f"allowed: {fits}; to hold less of the experts, raise parallel.expert"
