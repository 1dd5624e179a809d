"""Dropout as a part of a model."""

from typing import Annotated

from pydantic import Field

from mt_core.config.sections import Section
from mt_core.planning.layer_costs import LayerCosts, RankShape, SavedTensor

Rate = Annotated[float, Field(ge=0, lt=1)]
"""The share of elements that are dropped."""

MASK_TRAFFIC = 2
"""Elements read and written for each feature by dropping some, each way."""


class Dropout(Section):
    """The shares of elements that training sets to 0, the rest growing so that the mean stays (arXiv:1207.0580).

    Masks depend on the seed, the sample and where an element stands, so they are the same under every layout.
    Evaluation and generation drop nothing.
    """

    attention: Rate = 0.0
    """Share of attention's probabilities. Above 0, attention is written out in training, which is slower than the fused
    core and has all scores of a layer in memory."""
    hidden: Rate = 0.0
    """Share of the outputs of attention and feed-forward layer, before they are added to the residual stream."""
    embedding: Rate = 0.0
    """Share of the first layer's input: the sum of the embeddings of tokens, positions and token types."""

    @property
    def is_active(self) -> bool:
        """Whether anything is dropped."""
        return any((self.attention, self.hidden, self.embedding))

    def costs(self, shape: RankShape, size: int) -> LayerCosts:
        """The costs of dropping the outputs of one attention or feed-forward layer with so many features."""
        if not self.hidden:
            return LayerCosts()
        features = shape.tokens / shape.sequence_parts * size
        traffic = 0 if shape.compiled else MASK_TRAFFIC * features * shape.element_size
        return LayerCosts((SavedTensor("mask of dropped features", features),), 0, traffic, traffic)
