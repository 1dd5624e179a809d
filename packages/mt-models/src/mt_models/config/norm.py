"""Norms as parts of a model."""

from typing import Literal

from pydantic import PositiveFloat

from mt_core.config.sections import Section
from mt_models.config.tensors import CanonicalTensor, Tensors


class RMSNorm(Section):
    """x / sqrt(mean(x²) + eps) · weight."""

    kind: Literal["rms"] = "rms"
    eps: PositiveFloat = 1e-5
    """Added to the mean of the squares."""
    offset: bool = False
    """The factor is 1 + weight, so that a weight of zero changes nothing."""

    def tensors(self, name: str, size: int) -> Tensors:
        """The canonical tensors of a norm over `size` features."""
        return {f"{name}.weight": CanonicalTensor((size,))}


class LayerNorm(Section):
    """(x − mean) / sqrt(var + eps) · weight + bias."""

    kind: Literal["layer"] = "layer"
    eps: PositiveFloat = 1e-5
    """Added to the variance."""

    def tensors(self, name: str, size: int) -> Tensors:
        """The canonical tensors of a norm over `size` features."""
        return {f"{name}.{leaf}": CanonicalTensor((size,)) for leaf in ("weight", "bias")}
