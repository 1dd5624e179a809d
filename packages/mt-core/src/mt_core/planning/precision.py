"""Bytes of a parameter's state in each precision with Adam: 18 in bf16, 20 in fp16, 16 in fp32.

Source: docs/specs/core.md §6.4.
"""

from dataclasses import dataclass
from typing import Any

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
AUTO = {"bf16": "fp32", "fp16": "fp16", "fp32": "fp32", "fp64": "fp64"}
"""The dtype of gradients under `precision.gradients = "auto"`."""


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes per parameter."""

    weight: int
    """What the model computes with."""
    gradient: int
    """In which micro-batches' gradients are added up."""
    wide_gradient: int
    """The optimizer's fp32 copy of a narrower gradient."""
    master: int
    """The fp32 weight that is updated, if it is another than the model's."""
    moments: int
    """Adam's two moments."""

    @property
    def wide(self) -> int:
        """An element of what the optimizer updates."""
        return self.moments // 2

    @property
    def sharded(self) -> int:
        """What only the optimizer needs, which ZeRO-1 divides among ranks."""
        return self.wide_gradient + self.master + self.moments


def state_bytes(precision: Any) -> StateBytes:
    """Bytes per parameter of a `PrecisionConfig`."""
    weight = BYTES[precision.dtype]
    gradients = getattr(precision, "gradients", "auto")
    gradient = BYTES[AUTO[precision.dtype] if gradients == "auto" else gradients]
    wide = max(weight, 4)
    return StateBytes(weight, gradient, 0 if gradient >= wide else wide, 0 if weight == wide else wide, 2 * wide)
