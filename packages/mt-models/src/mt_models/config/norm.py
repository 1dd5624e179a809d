"""Norms as parts of a model."""

from typing import Literal

from pydantic import PositiveFloat

from mt_core.config.sections import Section
from mt_core.planning.layer_costs import LayerCosts, RankShape, SavedTensor
from mt_models.config.tensors import CanonicalTensor, Tensors

TRAFFIC = {True: (4, 4), False: (5, 6)}
"""Elements read and written for each feature by a norm and the residual sum around it, forward and backward, by whether
they are compiled: into one kernel with two inputs and two results, else one for each function."""


def norm_costs(shape: RankShape, size: int, statistics: int) -> LayerCosts:
    """The costs of a norm over `size` features, which saves so many fp32 numbers of each token, and a residual sum."""
    tokens = shape.tokens / shape.sequence_parts
    features = tokens * size * shape.element_size
    forward, backward = TRAFFIC[shape.compiled]
    return LayerCosts(
        saved=(
            SavedTensor("input of the norm", features),
            SavedTensor("statistics of the norm", tokens * statistics * shape.wide_size),
            SavedTensor("normalised input of the projection", features),
        ),
        forward_bytes=forward * features,
        backward_bytes=backward * features,
    )


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

    def costs(self, shape: RankShape, size: int) -> LayerCosts:
        """The costs of a norm over `size` features and of the residual sum around it."""
        return norm_costs(shape, size, statistics=1)


class LayerNorm(Section):
    """(x − mean) / sqrt(var + eps) · weight + bias."""

    kind: Literal["layer"] = "layer"
    eps: PositiveFloat = 1e-5
    """Added to the variance."""

    def tensors(self, name: str, size: int) -> Tensors:
        """The canonical tensors of a norm over `size` features."""
        return {f"{name}.{leaf}": CanonicalTensor((size,)) for leaf in ("weight", "bias")}

    def costs(self, shape: RankShape, size: int) -> LayerCosts:
        """The costs of a norm over `size` features and of the residual sum around it."""
        return norm_costs(shape, size, statistics=2)
