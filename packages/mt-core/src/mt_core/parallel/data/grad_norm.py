"""Sums and norms over the whole gradient, once data-parallel ranks have reduced it."""

import torch
from torch import Tensor

from mt_core.distributed.mesh import Axis
from mt_core.parallel.data.protocol import DataParallel


@torch.no_grad()
def all_reduce_partial_grads(data_parallel: DataParallel) -> None:
    """Add up, in place, gradients of which each of several ranks has a part: weights used on a part of the sequence,
    repeated key/value groups, and weights that several stages have. One all-reduce for each axis."""
    parts: dict[Axis, list[Tensor]] = {}
    for name, gradient in _list_gradients(data_parallel):
        placement = data_parallel.placements[name]
        if placement.partial:
            _, replicated = data_parallel.split_replicated(name, gradient)
            parts.setdefault(placement.replicas, []).append(replicated)
    for name, gradient in _list_gradients(data_parallel):
        if (tied := data_parallel.placements[name].tied).size > 1:
            parts.setdefault(tied, []).append(gradient)
    for axis, pieces in parts.items():
        flat = axis.sum_(torch.cat([piece.flatten() for piece in pieces]))
        for piece, total in zip(pieces, flat.split([piece.numel() for piece in pieces]), strict=True):
            piece.copy_(total.view_as(piece))


@torch.no_grad()
def compute_local_norms(data_parallel: DataParallel) -> Tensor:
    """Return this rank's share of the norm of each main parameter's gradient, in their order; elements that several
    ranks hold are counted by one."""
    counted = []
    for name, gradient in _list_gradients(data_parallel):
        unique, replicated = data_parallel.split_replicated(name, gradient)
        placement = data_parallel.placements[name]
        part = gradient if placement.replicas.rank == 0 else unique
        counted.append(part if placement.tied.rank == 0 else part.flatten()[:0])
        assert unique.numel() + replicated.numel() == gradient.numel()
    if not counted:  # this rank has no main parameter: the ranks' sums must have one dtype all the same
        wide = torch.promote_types(data_parallel.dtype, torch.float32)
        return torch.zeros(0, device=data_parallel.device, dtype=wide)
    return torch.stack(torch._foreach_norm(counted))  # pyright: ignore[reportPrivateImportUsage]


def compute_global_norm(data_parallel: DataParallel, local_norms: Tensor) -> Tensor:
    """Return the norm of the whole gradient, from the local norms of every rank."""
    mesh = data_parallel.mesh
    if mesh.expert.size == 1:
        square = mesh.shard.sum_(local_norms.square().sum())
    else:
        axes = [data_parallel.placements[name].axis for name, _ in _list_gradients(data_parallel)]
        experts = _sum_squares(local_norms, [axis == mesh.expert_parts for axis in axes])
        others = _sum_squares(local_norms, [axis != mesh.expert_parts for axis in axes])
        square = mesh.shard.sum_(others) + mesh.expert.sum_(mesh.expert_shard.sum_(experts))
    return mesh.pipeline.sum_(mesh.tensor.sum_(square)).sqrt()


def _sum_squares(norms: Tensor, selected: list[bool]) -> Tensor:
    """Sum up the squares of the selected norms."""
    some = [norm for norm, is_selected in zip(norms.unbind(), selected, strict=True) if is_selected]
    return torch.stack(some).square().sum() if some else norms.new_zeros(())


def _list_gradients(data_parallel: DataParallel) -> list[tuple[str, Tensor]]:
    parameters = data_parallel.main_params.items()
    return [(name, parameter.grad) for name, parameter in parameters if parameter.grad is not None]
