"""How many ranks lie along each axis, and who stands where. Torch-free."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm

from mt_core.config.sections import ParallelConfig
from mt_core.errors import MtError

AXES = ("data", "context", "tensor")
"""Outermost first: neighbouring ranks differ in their place along `tensor` (docs/specs/core.md §1.1)."""


@dataclass(frozen=True, slots=True)
class ParallelDims:
    """Sizes of the axes; their product is the number of ranks."""

    data: int = 1
    context: int = 1
    tensor: int = 1
    shard: int | None = None
    """Ranks of data × context that share one copy of the sharded state; None for all of them."""
    expert: int = 1
    """Neighbours on data × context that share each layer's experts: a second view of the same ranks."""

    @property
    def ranks(self) -> int:
        """Ranks of the whole run."""
        return self.data * self.context * self.tensor

    @property
    def sharers(self) -> int:
        """Ranks that share one copy of the sharded state."""
        return self.shard or self.data * self.context

    @property
    def expert_sharers(self) -> int:
        """Of the ranks that hold the same experts, those that share one copy of their sharded state.

        As many as there are in a shard group, if whole expert groups make one up; else in the fewest that they do.
        """
        return lcm(self.sharers, self.expert) // self.expert

    def groups(self, *axes: str) -> Iterator[list[int]]:
        """Every set of ranks that differ only along these axes, each in the order of the ranks."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        lines: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.ranks):
            place, rest = {}, rank
            for axis in reversed(AXES):
                rest, place[axis] = divmod(rest, sizes[axis])
            lines.setdefault(tuple(place[axis] for axis in AXES if axis not in axes), []).append(rank)
        yield from lines.values()

    def shard_groups(self) -> Iterator[list[int]]:
        """Ranks that share one copy of the sharded state: neighbours within data × context."""
        for line in self.groups("data", "context"):
            yield from neighbours(line, self.sharers)

    def replica_groups(self) -> Iterator[list[int]]:
        """Ranks that hold the same part of the sharded state."""
        for line in self.groups("data", "context"):
            yield from strides(line, self.sharers)

    def expert_groups(self) -> Iterator[list[int]]:
        """Ranks that hold different experts of the same layers: neighbours within data × context."""
        for line in self.groups("data", "context"):
            yield from neighbours(line, self.expert)

    def same_experts(self) -> Iterator[list[int]]:
        """Ranks that hold the same experts and see different tokens."""
        for line in self.groups("data", "context"):
            yield from strides(line, self.expert)

    def expert_shard_groups(self) -> Iterator[list[int]]:
        """Ranks that share one copy of the sharded state of the experts they all hold."""
        for line in self.same_experts():
            yield from neighbours(line, self.expert_sharers)

    def expert_replica_groups(self) -> Iterator[list[int]]:
        """Ranks that hold the same part of that state."""
        for line in self.same_experts():
            yield from strides(line, self.expert_sharers)


def neighbours(line: list[int], size: int) -> Iterator[list[int]]:
    """A line of ranks cut into pieces of `size`."""
    yield from (line[start : start + size] for start in range(0, len(line), size))


def strides(line: list[int], size: int) -> Iterator[list[int]]:
    """The ranks at the same place of each of those pieces."""
    yield from (line[place::size] for place in range(size))


def dims_of(config: ParallelConfig, ranks: int) -> ParallelDims:
    """The dims that a configuration means for a number of ranks; `MtError` if they do not fit."""
    model = config.tensor * config.context
    if config.data is None and ranks % model:
        found = f"tensor {config.tensor} × context {config.context} does not divide {ranks} ranks"
        raise MtError("parallel", found, f"start {-(-ranks // model) * model} ranks, or change one of the two")
    data = config.data or ranks // model
    if data * model != ranks:
        found = (
            f"tensor {config.tensor} × context {config.context} × data {data} = {data * model}, but {ranks} ranks run"
        )
        raise MtError("parallel.data", found, f"start {data * model} ranks, or leave data unset")
    tokens = data * config.context
    shard = {"replicate": 1, "zero1": config.shard_size, "fsdp": config.shard_size}[config.sharding]
    for field, size in (("shard_size", shard or 1), ("expert", config.expert)):
        if tokens % size:
            found, allowed = f"{size} does not divide data × context = {tokens}", range(1, tokens + 1)
            fits = ", ".join(str(number) for number in allowed if tokens % number == 0)
            raise MtError(f"parallel.{field}", found, f"allowed: {fits}")
    return ParallelDims(data, config.context, config.tensor, shard, config.expert)
