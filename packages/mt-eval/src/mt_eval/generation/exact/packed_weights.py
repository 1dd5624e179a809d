"""A model's matrices once more, in the order in which oneDNN reads them: products of a few rows take half the time.

torch's own product reads a weight of nn.Linear's shape across, which costs most where there are few rows. The packed
copies are made once, of fp32 models up to `MOST_BYTES`, and take as much memory again. A weight that is written to
afterwards is packed anew.

Shape suffixes: M rows, I and O features of inputs and outputs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST_BYTES = 4 * 2**30
"""Models with larger weights are not packed, as memory could run out."""
PACKED_ROWS = 128
"""The number of rows that weights are packed for; other numbers can be multiplied too."""


@dataclass(slots=True)
class PackedWeight:
    """A weight, and its packed copy once it was asked for."""

    weight: Tensor
    """Keeps the memory, so that no other tensor can come to lie at its address."""
    version: int = -1
    packed: Tensor | None = None


class PackedWeights:
    """Packed copies of parameters, which are found by where these lie in memory."""

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        weights = [p.detach() for p in parameters if p.dim() > 1 and p.dtype == torch.float32]
        fits = is_available() and sum(weight.nbytes for weight in weights) <= MOST_BYTES
        self._weights = {weight.data_ptr(): PackedWeight(weight) for weight in weights} if fits else {}

    def find(self, weight_OI: Tensor) -> Tensor | None:
        """The packed copy of a weight, or None for what is no whole parameter."""
        entry = self._weights.get(weight_OI.data_ptr())
        if entry is None or weight_OI.numel() != entry.weight.numel() or not weight_OI.is_contiguous():
            return None
        if entry.version != entry.weight._version:
            entry.packed, entry.version = pack(weight_OI), entry.weight._version
        return entry.packed


def is_available() -> bool:
    """Whether this build of torch multiplies by packed weights."""
    operators: Any = torch.ops.mkldnn
    needed = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(operators, name) for name in needed)


def pack(weight_OI: Tensor) -> Tensor:
    """The weight as oneDNN reads it; its shape stays."""
    operators: Any = torch.ops.mkldnn
    return operators._reorder_linear_weight(weight_OI, PACKED_ROWS)


def multiply_packed(x_MI: Tensor, packed_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """What `torch.nn.functional.linear` gives, in another order of additions."""
    operators: Any = torch.ops.mkldnn
    return operators._linear_pointwise(x_MI, packed_OI, bias_O, "none", [], "")
