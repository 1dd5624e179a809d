"""How many ranks lie along each axis, and who stands where. Torch-free."""

from collections.abc import Iterator
from dataclasses import dataclass

from mt_core.config.sections import ParallelConfig
from mt_core.errors import MtError

AXES = ("data", "context", "tensor")
"""Outermost first: neighbouring ranks differ in their place along `tensor` (spec/core.md §1.1)."""


@dataclass(frozen=True, slots=True)
class ParallelDims:
    """Sizes of the axes; their product is the number of ranks."""

    data: int = 1
    context: int = 1
    tensor: int = 1
    shard: int | None = None
    """Ranks of data × context that share one copy of the sharded state; None for all of them."""

    @property
    def ranks(self) -> int:
        """Ranks of the whole run."""
        return self.data * self.context * self.tensor

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
        size = self.shard or self.data * self.context
        for line in self.groups("data", "context"):
            yield from (line[start : start + size] for start in range(0, len(line), size))

    def replica_groups(self) -> Iterator[list[int]]:
        """Ranks that hold the same part of the sharded state."""
        size = self.shard or self.data * self.context
        for line in self.groups("data", "context"):
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
    shard = {"replicate": 1, "zero1": config.shard_size, "fsdp": config.shard_size}[config.sharding]
    if (data * config.context) % (shard or 1):
        found = f"{shard} does not divide data × context = {data * config.context}"
        allowed = [size for size in range(1, data * config.context + 1) if data * config.context % size == 0]
        raise MtError("parallel.shard_size", found, f"allowed: {', '.join(map(str, allowed))}")
    return ParallelDims(data, config.context, config.tensor, shard)
