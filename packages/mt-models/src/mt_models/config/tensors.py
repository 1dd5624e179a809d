"""Canonical tensors: name, shape and how ranks cut them. Each part of a model lists its own in its `tensors`.

Outputs come first: a projection from I to O features has a weight (O, I).
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from mt_core.parallel.cuts import TensorCut


class FusedModule(NamedTuple):
    """Projections of the same input that are one module in memory. Configurations and layers share these entries."""

    name: str
    """The module's name in its layer."""
    parts: tuple[str, ...]
    """Canonical names of the projections, siblings of the module, in the order in which they are fused."""


class CanonicalTensor(NamedTuple):
    """A tensor of a checkpoint: un-fused, un-padded, of all ranks."""

    shape: tuple[int, ...]
    cut: TensorCut | None = None
    """How ranks divide it; None if every rank has all of it."""
    fused: FusedModule | None = None
    """The module that has it in memory; None for a module of its own name."""

    def get_parameter(self, name: str) -> str:
        """The name of the parameter that holds canonical tensor `name`."""
        if self.fused is None:
            return name
        *parents, _, leaf = name.split(".")
        return ".".join((*parents, self.fused.name, leaf))


Tensors = dict[str, CanonicalTensor]

OUTPUTS, INPUTS = TensorCut(0), TensorCut(1)
"""The cut of a projection whose outputs, or whose inputs, the tensor ranks divide."""


def linear(name: str, out: int, into: int, *, bias: bool, cut: TensorCut | None = None) -> Tensors:
    """Weight and bias of a projection; a cut along dim 0, the outputs, divides both, one along dim 1 the weight."""
    tensors = {f"{name}.weight": CanonicalTensor((out, into), cut)}
    if bias:
        tensors[f"{name}.bias"] = CanonicalTensor((out,), cut if cut is not None and cut.dim == 0 else None)
    return tensors


def mark_fused(tensors: Tensors, layer: str, fused: FusedModule) -> Tensors:
    """The tensors of a layer, in which those of the module's parts say that it holds them."""
    parts = tuple(f"{layer}.{part}." for part in fused.parts)
    return {name: t._replace(fused=fused) if name.startswith(parts) else t for name, t in tensors.items()}


def repeat_block(block: Tensors, layers: int, prefix: str = "layers") -> Tensors:
    """The tensors of `layers` equal blocks, numbered after the prefix."""
    return {f"{prefix}.{n}.{name}": tensor for n in range(layers) for name, tensor in block.items()}


def count_parameters(tensors: Iterable[CanonicalTensor]) -> int:
    """Parameters in tensors, without padding."""
    return sum(math.prod(tensor.shape) for tensor in tensors)


def matrix_parameters(tensors: Mapping[str, CanonicalTensor]) -> int:
    """Parameters that each token is multiplied with: those of matrices."""
    return sum(math.prod(tensor.shape) for tensor in tensors.values() if len(tensor.shape) == 2)
