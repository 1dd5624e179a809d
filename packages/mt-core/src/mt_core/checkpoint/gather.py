"""Whole canonical tensors, gathered from the ranks that hold their parts to the one rank that wants them.

A parameter is in pieces twice: cut into boxes over the tensor or the expert axis, and shared over a shard axis.
`choose_owners` decides which rank writes which tensor, so that all write about as many bytes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mt_core.contracts import CanonicalModel
from mt_core.distributed.mesh import Axis, Mesh
from mt_core.parallel.data.protocol import DataParallel


@dataclass(frozen=True, slots=True)
class ShardCoordinates:
    """A rank's positions on the axes over which a parameter is repeated, sharded and cut."""

    replica: int
    shard: int
    cut: int
    """Position on the axis that cuts the parameter: tensor or expert."""
    tensor: int


def locate(mesh: Mesh, cut: Axis, rank: int, *, sharded: bool) -> ShardCoordinates:
    """Return where world rank `rank` stands for a parameter that is cut over the axis `cut`.

    A parameter that is not `sharded` is whole, but for the cut, on every rank that sees other tokens.
    """
    axes, experts = mesh.dims.coordinates(rank), cut == mesh.expert
    if sharded:
        replica, shard = (axes[f"expert_{name}" if experts else name] for name in ("replica", "shard"))
    else:
        replica, shard = axes["expert_data_parallel" if experts else "data_context"], 0
    return ShardCoordinates(replica, shard, axes["expert" if experts else "tensor"], axes["tensor"])


def gather_whole(
    model: CanonicalModel, engine: DataParallel, name: str, part: Tensor | None, owner: int, *, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Canonical names and whole tensors on world rank `owner`, nothing elsewhere; every rank must iterate over it.

    `part` is shaped like this rank's master of parameter `name`: the master itself or a moment of it, or the frozen
    parameter; None where the rank has none. `dtype` is that of the parts, which the owner may not have.
    """
    mesh, cut, shard = engine.mesh, engine.placements[name].axis, engine.shard_axis(name)
    here, there = (locate(mesh, cut, rank, sharded=shard.size > 1) for rank in (mesh.world.rank, owner))
    replicated = cut.size == 1 or cut == mesh.expert  # over tensor ranks, so only one of them sends
    if here.replica != there.replica or (replicated and here.tensor != there.tensor):
        return
    assert part is None or part.dtype == dtype, f"{name}: {part.dtype} is not {dtype}"
    local = _over_shards(engine, name, part, there.shard, dtype)
    if local is None:
        return
    for canonical, piece in model.to_canonical(name, local, cut.rank, cut.size):
        whole = _over_cut(model, cut, name, canonical, piece, there.cut)
        if whole is not None:
            yield canonical, whole


def _over_shards(engine: DataParallel, name: str, part: Tensor | None, owner: int, dtype: torch.dtype) -> Tensor | None:
    axis = engine.shard_axis(name)
    if axis.size == 1:
        return part
    if axis.rank != owner:
        if part is not None:
            axis.send(part.contiguous(), owner)
        return None
    whole = torch.empty(engine.shapes[name], dtype=dtype, device=engine.device)
    for rank in range(axis.size):
        if rank == owner and part is not None:
            _paste(engine, name, whole, rank, part)
        elif rank != owner and (shape := engine.view(name, whole, rank).shape).numel():
            _paste(engine, name, whole, rank, axis.receive_(whole.new_empty(shape), rank))
    return whole


def _paste(engine: DataParallel, name: str, whole: Tensor, rank: int, part: Tensor) -> None:
    engine.view(name, whole, rank).copy_(part)


def _over_cut(model: CanonicalModel, axis: Axis, name: str, canonical: str, piece: Tensor, owner: int) -> Tensor | None:
    if axis.size == 1:
        return piece
    if axis.rank != owner:
        axis.send(piece.contiguous(), owner)
        return None
    whole = piece.new_empty(model.config.canonical_shapes()[canonical])
    for rank in range(axis.size):
        box = model.canonical_regions(name, rank, axis.size)[canonical]
        here = whole[box]
        here.copy_(
            piece
            if rank == owner
            else axis.receive_(torch.empty_like(here, memory_format=torch.contiguous_format), rank)
        )
    return whole


def choose_owners(nbytes: Mapping[str, int], candidates: Callable[[str], Sequence[int]]) -> dict[str, int]:
    """Tensor name → rank: the largest first, each to the candidate that has the fewest bytes so far.

    `candidates(name)` are the ranks that can gather the tensor. Every rank computes the same table from the same input.
    """
    loads: dict[int, int] = {}
    owners: dict[str, int] = {}
    for name in sorted(nbytes, key=lambda name: (-nbytes[name], name)):
        owner = min(candidates(name), key=lambda rank: (loads.get(rank, 0), rank))
        loads[owner] = loads.get(owner, 0) + nbytes[name]
        owners[name] = owner
    return owners
