"""Whole canonical tensors, gathered from the ranks that hold their parts to the one rank that wants them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mt_core.parallel.data_parallel import DataParallel
from mt_core.parallel.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Place:
    """A rank, by its places on the axes that share weights."""

    replica: int
    shard: int
    tensor: int


def place_of(mesh: Mesh, rank: int) -> Place:
    """Where world rank `rank` stands: tensor is the innermost axis, then the shard axis, then the replicas."""
    tokens, tensor = divmod(rank, mesh.tensor.size)
    replica, shard = divmod(tokens, mesh.shard.size)
    return Place(replica, shard, tensor)


def gather_whole(
    model: Any, engine: DataParallel, name: str, part: Tensor | None, owner: Place
) -> Iterator[tuple[str, Tensor]]:
    """Canonical names and whole tensors on the owner, nothing elsewhere; every rank must iterate over it.

    `part` is shaped like this rank's master of parameter `name`: the master itself or a moment of it.
    """
    mesh = engine.mesh
    if mesh.replica.rank != owner.replica:
        return
    local = _over_shards(engine, name, part, owner.shard)
    if local is None:
        return
    parts = dict(model.to_canonical(name, local, mesh.tensor.rank, mesh.tensor.size))
    if all(not box for box in model.canonical_boxes(name, 0, mesh.tensor.size).values()):
        if mesh.tensor.rank == owner.tensor:
            yield from parts.items()
        return
    for canonical, piece in parts.items():
        whole = _over_tensor_ranks(model, mesh, name, canonical, piece, owner.tensor)
        if whole is not None:
            yield canonical, whole


def _over_shards(engine: DataParallel, name: str, part: Tensor | None, owner: int) -> Tensor | None:
    axis = engine.mesh.shard
    if axis.size == 1:
        return part
    if axis.rank != owner:
        if part is not None:
            axis.send(part.contiguous(), owner)
        return None
    some = next(iter(engine.masters.values())) if part is None else part
    whole = torch.empty(engine.shapes[name], dtype=some.dtype, device=some.device)
    for rank in range(axis.size):
        if rank == owner and part is not None:
            _paste(engine, name, whole, rank, part)
        elif rank != owner and (shape := engine.view(name, whole, rank).shape).numel():
            _paste(engine, name, whole, rank, axis.receive_(whole.new_empty(shape), rank))
    return whole


def _paste(engine: DataParallel, name: str, whole: Tensor, rank: int, part: Tensor) -> None:
    engine.view(name, whole, rank).copy_(part)


def _over_tensor_ranks(model: Any, mesh: Mesh, name: str, canonical: str, piece: Tensor, owner: int) -> Tensor | None:
    axis = mesh.tensor
    if axis.size == 1:
        return piece
    if axis.rank != owner:
        axis.send(piece.contiguous(), owner)
        return None
    whole = piece.new_empty(model.config.canonical_shapes()[canonical])
    for rank in range(axis.size):
        box = model.canonical_boxes(name, rank, axis.size)[canonical]
        here = whole[box]
        here.copy_(
            piece
            if rank == owner
            else axis.receive_(torch.empty_like(here, memory_format=torch.contiguous_format), rank)
        )
    return whole
