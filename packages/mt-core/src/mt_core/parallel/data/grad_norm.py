"""What is done to the whole gradient once data-parallel ranks have reduced it."""

import torch
from torch import Tensor

from mt_core.distributed.mesh import Axis
from mt_core.parallel.data.protocol import DataParallel


@torch.no_grad()
def sum_partial(engine: DataParallel) -> None:
    """Add up, in place, gradients of which each tensor rank has a part: weights used on a part of the sequence, and
    repeated key/value groups. One sum for each axis."""
    parts: dict[Axis, list[Tensor]] = {}
    for name, gradient in _gradients(engine):
        place = engine.placements[name]
        if place.partial:
            parts.setdefault(place.replicas, []).append(engine.split(name, gradient)[1])
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
        own, replicated = engine.split(name, gradient)
        first = engine.placements[name].replicas.rank == 0
        counted.append(gradient if first else own)
        assert own.numel() + replicated.numel() == gradient.numel()
    if not counted:  # no part of any master: the ranks' sums must have one dtype all the same
        return torch.zeros(0, device=engine.device, dtype=torch.promote_types(engine.dtype, torch.float32))
    return torch.stack(torch._foreach_norm(counted))  # pyright: ignore[reportPrivateImportUsage]


def global_norm(engine: DataParallel, own_norms: Tensor) -> Tensor:
    """The norm of the whole gradient, from every rank's `norms`."""
    mesh = engine.mesh
    if mesh.expert.size == 1:
        square = mesh.shard.sum_(own_norms.square().sum())
    else:
        names = [name for name, _ in _gradients(engine)]
        of_experts = [engine.placements[name].axis == mesh.expert for name in names]
        experts, others = (_square(own_norms, [flag == wanted for flag in of_experts]) for wanted in (True, False))
        square = mesh.shard.sum_(others) + mesh.expert.sum_(mesh.expert_shard.sum_(experts))
    return mesh.tensor.sum_(square).sqrt()


def _square(norms: Tensor, chosen: list[bool]) -> Tensor:
    """The sum of the squares of some of the norms."""
    some = [norm for norm, wanted in zip(norms.unbind(), chosen, strict=True) if wanted]
    return torch.stack(some).square().sum() if some else norms.new_zeros(())


def _gradients(engine: DataParallel) -> list[tuple[str, Tensor]]:
    return [(name, master.grad) for name, master in engine.masters.items() if master.grad is not None]
