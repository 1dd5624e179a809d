"""Gather whole canonical tensors onto the rank that writes them.

Parameters are sharded twice: cut into regions over the tensor or the expert axis, and by ZeRO-1 or FSDP over a shard
axis. `assign_writers` decides which rank writes which tensor, so that all write about as many bytes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mt_core.contracts import CanonicalModel
from mt_core.distributed.mesh import Axis, Mesh
from mt_core.parallel.data.protocol import DataParallel
from mt_core.parallel.tensor.placement import Placement


@dataclass(frozen=True, slots=True)
class ShardCoordinates:
    """A rank's positions on the axes over which a parameter is repeated, sharded and cut."""

    replica: int
    shard: int
    cut: int
    """Position on the axis that cuts the parameter: tensor, expert, or both together."""
    tensor: int


def locate(mesh: Mesh, cut: Axis, rank: int, *, sharded: bool) -> ShardCoordinates:
    """Return the coordinates of world rank `rank` for a parameter that is cut over the axis `cut`.

    A parameter that is not `sharded` is whole, but for the cut, on every rank that sees other tokens.
    """
    axes, experts = mesh.dims.coordinates(rank), cut == mesh.expert_parts
    if sharded:
        replica, shard = (axes[f"expert_{name}" if experts else name] for name in ("replica", "shard"))
    else:
        replica, shard = axes["expert_data_parallel" if experts else "data_context"], 0
    parts = "expert" if mesh.dims.expert_tensor == 1 else "expert_parts"
    return ShardCoordinates(replica, shard, axes[parts if experts else "tensor"], axes["tensor"])


def gather_whole(
    model: CanonicalModel,
    data_parallel: DataParallel,
    name: str,
    part: Tensor | None,
    writer: int,
    *,
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    """Yield canonical names and whole tensors on world rank `writer`, nothing elsewhere; every rank must iterate.

    `part` is shaped like this rank's main parameter `name`: the parameter itself or a moment of it, or the frozen
    parameter; None where the rank has none. `dtype` is that of the parts, which the writer may not have.
    """
    mesh, cut, shard = data_parallel.mesh, data_parallel.placements[name].axis, data_parallel.shard_axis(name)
    here, there = (locate(mesh, cut, rank, sharded=shard.size > 1) for rank in (mesh.world.rank, writer))
    whole_experts = cut == mesh.expert_parts and mesh.dims.expert_tensor == 1
    replicated = cut.size == 1 or whole_experts  # over tensor ranks, so only one of them sends
    if here.replica != there.replica or (replicated and here.tensor != there.tensor):
        return
    assert part is None or part.dtype == dtype, f"{name}: {part.dtype} is not {dtype}"
    local = _gather_over_shards(data_parallel, name, part, there.shard, dtype)
    if local is None:
        return
    placement = data_parallel.placements[name]
    for canonical, piece in model.to_canonical(name, local, cut.rank, cut.size, placement.inner):
        whole = _gather_over_cut(model, placement, name, canonical, piece, there.cut)
        if whole is not None:
            yield canonical, whole


def _gather_over_shards(
    data_parallel: DataParallel, name: str, part: Tensor | None, writer: int, dtype: torch.dtype
) -> Tensor | None:
    axis = data_parallel.shard_axis(name)
    if axis.size == 1:
        return part
    if axis.rank != writer:
        if part is not None:
            axis.send(part.contiguous(), writer)
        return None
    whole = torch.empty(data_parallel.shapes[name], dtype=dtype, device=data_parallel.device)
    for rank in range(axis.size):
        if rank == writer and part is not None:
            _paste(data_parallel, name, whole, rank, part)
        elif rank != writer and (shape := data_parallel.local_shard(name, whole, rank).shape).numel():
            _paste(data_parallel, name, whole, rank, axis.receive_(whole.new_empty(shape), rank))
    return whole


def _paste(data_parallel: DataParallel, name: str, whole: Tensor, rank: int, part: Tensor) -> None:
    data_parallel.local_shard(name, whole, rank).copy_(part)


def _gather_over_cut(
    model: CanonicalModel, placement: Placement, name: str, canonical: str, piece: Tensor, writer: int
) -> Tensor | None:
    axis = placement.axis
    if axis.size == 1:
        return piece
    if axis.rank != writer:
        axis.send(piece.contiguous(), writer)
        return None
    whole = piece.new_empty(model.config.canonical_shapes()[canonical])
    for rank in range(axis.size):
        region = model.canonical_regions(name, rank, axis.size, placement.inner)[canonical]
        here = whole[region]
        here.copy_(
            piece
            if rank == writer
            else axis.receive_(torch.empty_like(here, memory_format=torch.contiguous_format), rank)
        )
    return whole


def assign_writers(nbytes: Mapping[str, int], candidates: Callable[[str], Sequence[int]]) -> dict[str, int]:
    """Assign each tensor to a rank: the largest first, each to the candidate that has the fewest bytes so far.

    `candidates(name)` are the ranks that can gather the tensor. Every rank computes the same table from the same input.
    """
    loads: dict[int, int] = {}
    writers: dict[str, int] = {}
    for name in sorted(nbytes, key=lambda name: (-nbytes[name], name)):
        writer = min(candidates(name), key=lambda rank: (loads.get(rank, 0), rank))
        loads[writer] = loads.get(writer, 0) + nbytes[name]
        writers[name] = writer
    return writers
