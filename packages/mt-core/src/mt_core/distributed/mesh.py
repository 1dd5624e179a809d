"""The ranks of a run as axes: `Axis` is one group of ranks as this rank sees it, `Mesh` all of them.

An axis of size 1 has no group, and every collective on it is the identity. The mesh is passed to whoever needs it; two
can live in one process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed.distributed_c10d import GroupName

from mt_core.distributed.topology import ParallelDims, split_group


@dataclass(frozen=True, slots=True)
class Axis:
    """A named axis of ranks: this rank's position, their number, and the group that connects them."""

    name: str
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def group_name(self) -> str:
        """Name of the group, by which operators look it up (`find_axis`)."""
        assert self.group is not None
        return self.group.group_name

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the axis, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Take the maximum of each element over the axis, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def send(self, tensor: Tensor, to: int) -> None:
        """Send a contiguous tensor to the rank at position `to` of the axis."""
        dist.send(tensor, group=self.group, group_dst=to)

    def receive_(self, tensor: Tensor, source: int) -> Tensor:
        """Receive a contiguous tensor, in place, from the rank at position `source` of the axis."""
        dist.recv(tensor, group=self.group, group_src=source)
        return tensor

    def barrier(self) -> None:
        """Wait for every rank of the axis."""
        if self.size > 1:
            dist.barrier(group=self.group)


@dataclass(frozen=True, slots=True)
class Mesh:
    """This rank's position along every axis."""

    dims: ParallelDims = field(default_factory=ParallelDims)
    """The sizes of the axes, and the coordinates of every other rank."""
    world: Axis = Axis("world")
    """All ranks."""
    data: Axis = Axis("data")
    """Ranks that take different samples."""
    context: Axis = Axis("context")
    """Ranks that hold different parts of the same samples."""
    tensor: Axis = Axis("tensor")
    """Ranks that hold different parts of the same matrices."""
    pipeline: Axis = Axis("pipeline")
    """Ranks that hold different layers."""
    data_context: Axis = Axis("data_context")
    """data × context: ranks that see different tokens with the same weights."""
    shard: Axis = Axis("shard")
    """The part of `data_context` that shares one copy of the sharded state."""
    replica: Axis = Axis("replica")
    """Ranks of `data_context` that hold the same part of the sharded state."""
    expert: Axis = Axis("expert")
    """The part of `data_context` whose ranks hold different experts of the same layers."""
    expert_parts: Axis = Axis("expert")
    """Ranks that hold different parts of the same layers' experts: `expert`, times `tensor` where that shares each."""
    expert_shard: Axis = Axis("shard")
    """Ranks with the same experts that share one copy of their sharded state."""
    expert_replica: Axis = Axis("replica")
    """Ranks that hold the same part of the sharded state of the same experts."""

    def shard_axes(self, cut: Axis) -> tuple[Axis, Axis]:
        """Return the shard and the replica axis of parameters cut over the axis `cut`: experts have their own."""
        return (self.expert_shard, self.expert_replica) if cut == self.expert_parts else (self.shard, self.replica)

    @property
    def stage_ranks(self) -> range:
        """The world ranks that hold the same layers as this one."""
        first = self.pipeline.rank * self.dims.stage_ranks
        return range(first, first + self.dims.stage_ranks)

    def sum_over_losses_(self, tensor: Tensor) -> Tensor:
        """Sum, in place, what each rank has of a sum over tokens, of which only some stages have a part."""
        return self.pipeline.sum_(self.data_context.sum_(tensor))

    def connect_stages(self, name: str, positions: Sequence[int]) -> Axis:
        """Connect the ranks at these positions of each pipeline; every rank must call it, also one that is none.

        The order of positions is that of the axis; a rank at none of them gets an axis of size 1.
        """
        groups = [[ranks[position] for position in positions] for ranks in self.dims.groups("pipeline")]
        group, _ = dist.new_subgroups_by_enumeration(groups)
        if self.pipeline.rank not in positions:
            return Axis(name)
        assert isinstance(group, dist.ProcessGroup)
        return Axis(name, [*positions].index(self.pipeline.rank), len(positions), group)


def make_mesh(dims: ParallelDims) -> Mesh:
    """Connect the ranks of the process group along every axis; every rank must call it with the same dims."""
    if dims.ranks == 1:
        return Mesh()
    axes = {"world": _connect("world", [[*range(dims.ranks)]])}
    for name in ("pipeline", "data", "context", "tensor", "data_context", "shard", "replica", "expert"):
        axes[name] = _connect(name, dims.groups(name))
    axes["expert_parts"] = _connect_expert_parts(dims, axes)
    if dims.expert == 1:
        return Mesh(dims, **axes, expert_shard=axes["shard"], expert_replica=axes["replica"])
    for name in ("expert_shard", "expert_replica"):
        axes[name] = _connect(name, dims.groups(name))
    return Mesh(dims, **axes)


def _connect_expert_parts(dims: ParallelDims, axes: Mapping[str, Axis]) -> Axis:
    if dims.expert_tensor == 1:
        return axes["expert"]
    return axes["tensor"] if dims.expert == 1 else _connect("expert_parts", dims.groups("expert_parts"))


def _connect(name: str, groups: list[list[int]]) -> Axis:
    """Create the process groups of an axis, and return this rank's."""
    if len(groups[0]) == 1:
        return Axis(name)
    rank = dist.get_rank()
    ranks = next(group for group in groups if rank in group)
    if len(ranks) == dist.get_world_size():
        return Axis(name, ranks.index(rank), len(ranks), dist.group.WORLD)
    group, _ = dist.new_subgroups_by_enumeration(groups)
    assert isinstance(group, dist.ProcessGroup)
    return Axis(name, ranks.index(rank), len(ranks), group)


def make_subaxis(axis: Axis, size: int) -> Axis:
    """Connect this rank with its `size` neighbours on the axis; every rank of the axis must call it."""
    if size == 1:
        return Axis(axis.name)
    if size == axis.size:
        return axis
    assert axis.group is not None
    rank = dist.get_rank()
    ranks = next(part for part in split_group(dist.get_process_group_ranks(axis.group), size) if rank in part)
    group = dist.new_group(ranks, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return Axis(axis.name, ranks.index(rank), size, group)


def find_axis(group_name: str) -> Axis:
    """Find the axis whose group has this name."""
    group = _resolve_process_group(GroupName(group_name))
    return Axis("", group.rank(), group.size(), group)
