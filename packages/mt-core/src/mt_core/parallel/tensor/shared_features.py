"""Features that every head reads, such as the rotary part of latent attention's keys, where tensor ranks divide heads.

Each rank's heads give a part of their gradient, so backward sums over the ranks. Under sequence parallelism a rank has
computed them for its tokens alone: forward gathers, and backward scatters the sum. Both are operators of torch's
library, so a compiled layer stays one graph around them.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mt_core.distributed.mesh import Axis, find_axis
from mt_core.parallel.tensor import collectives
from mt_core.parallel.tensor.linear_operators import SEQUENCE


def share_features(x_BTK: Tensor) -> Tensor:
    """Pass features on to all heads, on one device: unchanged."""
    return x_BTK


@dataclass(frozen=True, slots=True)
class SharedFeatures:
    """`share_features` where the heads that read them are cut over an axis."""

    axis: Axis
    sequence: bool

    def __call__(self, x_BTK: Tensor) -> Tensor:
        """[B, T, K], of this rank's part of the sequence if that is cut, to [B, T, K] of all of it."""
        return x_BTK if self.axis.size == 1 else _share(x_BTK, self.axis.group_name, self.sequence)


@torch.library.custom_op("mt::share_features", mutates_args=())
def _share(x: Tensor, group: str, sequence: bool) -> Tensor:
    return collectives.all_gather_async(x, find_axis(group), SEQUENCE)() if sequence else x.clone()


@_share.register_fake
def _(x: Tensor, group: str, sequence: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] * (find_axis(group).size if sequence else 1), x.shape[2])


@torch.library.custom_op("mt::share_features_backward", mutates_args=())
def _sum(g: Tensor, group: str, sequence: bool) -> Tensor:
    axis = find_axis(group)
    return (
        collectives.reduce_scatter_async(g, axis, SEQUENCE) if sequence else collectives.all_reduce_async(g, axis)
    )()


@_sum.register_fake
def _(g: Tensor, group: str, sequence: bool) -> Tensor:
    return g.new_empty(g.shape[0], g.shape[1] // (find_axis(group).size if sequence else 1), g.shape[2])


class _Context(Protocol):
    group: str
    sequence: bool


def _save(ctx: _Context, inputs: tuple[Tensor, str, bool], output: Tensor) -> None:
    _, ctx.group, ctx.sequence = inputs


def _gradients(ctx: _Context, g: Tensor) -> tuple[Tensor, None, None]:
    return _sum(g, ctx.group, ctx.sequence), None, None


_share.register_autograd(_gradients, setup_context=_save)
