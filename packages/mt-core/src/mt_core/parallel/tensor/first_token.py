"""The features of every sequence's first token, which under sequence parallelism the first tensor rank alone has.

All tensor ranks then compute the same from them, a pooler and its heads, so their weights have the whole gradient on
every rank, and the first rank's part of the sequence gets that of the features once.
"""

from dataclasses import dataclass

from torch import Tensor

from mt_core.distributed.mesh import Axis
from mt_core.parallel.tensor.collectives import gather_from_tensor_parallel
from mt_core.parallel.tensor.linear_operators import SEQUENCE


def take_first_token(x_BTD: Tensor) -> Tensor:
    """[B, T, D] of whole sequences to [B, D]."""
    return x_BTD[:, 0]


@dataclass(frozen=True, slots=True)
class SharedFirstToken:
    """`take_first_token` where tensor ranks may hold a part of the sequence each."""

    axis: Axis
    sequence: bool

    def __call__(self, x_BTD: Tensor) -> Tensor:
        """[B, T of this rank, D] to [B, D], the same on every rank."""
        first_B1D = x_BTD[:, :1]
        return (gather_from_tensor_parallel(first_B1D, self.axis, SEQUENCE) if self.sequence else first_B1D)[:, 0]
