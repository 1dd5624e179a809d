"""Canonical tensors: name, shape and how ranks cut them. Each part of a model lists its own in its `tensors`.

Outputs come first: a projection from I to O features has a weight (O, I).
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from mt_core.contracts import TensorCut


class CanonicalTensor(NamedTuple):
    """A tensor of a checkpoint: un-fused, un-padded, of all ranks."""

    shape: tuple[int, ...]
    cut: TensorCut | None = None
    """How ranks divide it; None if every rank has all of it."""


Tensors = dict[str, CanonicalTensor]

OUTPUTS, INPUTS = TensorCut(0), TensorCut(1)
"""The cut of a projection whose outputs, or whose inputs, the tensor ranks divide."""


def linear(name: str, out: int, into: int, *, bias: bool, cut: TensorCut | None = None) -> Tensors:
    """Weight and bias of a projection; a cut along dim 0, the outputs, divides both, one along dim 1 the weight."""
    tensors = {f"{name}.weight": CanonicalTensor((out, into), cut)}
    if bias:
        tensors[f"{name}.bias"] = CanonicalTensor((out,), cut if cut is not None and cut.dim == 0 else None)
    return tensors


def repeat_block(block: Tensors, layers: int, prefix: str = "layers") -> Tensors:
    """The tensors of `layers` equal blocks, numbered after the prefix."""
    return {f"{prefix}.{n}.{name}": tensor for n in range(layers) for name, tensor in block.items()}


def count_parameters(tensors: Iterable[CanonicalTensor]) -> int:
    """Parameters in tensors, without padding."""
    return sum(math.prod(tensor.shape) for tensor in tensors)


def matrix_parameters(tensors: Mapping[str, CanonicalTensor]) -> int:
    """Parameters that each token is multiplied with: those of matrices."""
    return sum(math.prod(tensor.shape) for tensor in tensors.values() if len(tensor.shape) == 2)
