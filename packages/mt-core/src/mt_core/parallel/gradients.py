"""What is done to the whole gradient once data-parallel ranks have reduced it."""

import torch
from torch import Tensor

from mt_core.parallel.axis import Axis
from mt_core.parallel.data_parallel import DataParallel


@torch.no_grad()
def sum_partial(engine: DataParallel) -> None:
    """Add up, in place, gradients of which each tensor rank has a part: weights used on a part of the sequence, and
    repeated key/value groups. One sum for each axis."""
    parts: dict[Axis, list[Tensor]] = {}
    for name, gradient in _gradients(engine):
        place = engine.placements[name]
        if place.partial:
            parts.setdefault(place.copies, []).append(engine.split(name, gradient)[1])
    for axis, pieces in parts.items():
        flat = axis.sum_(torch.cat([piece.flatten() for piece in pieces]))
        for piece, total in zip(pieces, flat.split([piece.numel() for piece in pieces]), strict=True):
            piece.copy_(total.view_as(piece))


@torch.no_grad()
def norms(engine: DataParallel) -> Tensor:
    """This rank's share of the norm of each master's gradient, in their order; elements that several ranks hold are
    counted by one."""
    counted = []
    for name, gradient in _gradients(engine):
        own, copied = engine.split(name, gradient)
        first = engine.placements[name].copies.rank == 0
        counted.append(gradient if first else own)
        assert own.numel() + copied.numel() == gradient.numel()
    if not counted:
        return torch.zeros(0, device=engine.device)
    return torch.stack(torch._foreach_norm(counted))  # pyright: ignore[reportPrivateImportUsage]


def global_norm(engine: DataParallel, own_norms: Tensor) -> Tensor:
    """The norm of the whole gradient, from every rank's `norms`."""
    square = own_norms.square().sum()
    return engine.mesh.tensor.sum_(engine.mesh.shard.sum_(square)).sqrt()


def _gradients(engine: DataParallel) -> list[tuple[str, Tensor]]:
    return [(name, master.grad) for name, master in engine.masters.items() if master.grad is not None]
