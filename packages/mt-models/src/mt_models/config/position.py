"""Positions as parts of a model."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from mt_core.config.sections import Section


class Linear(Section):
    """Positions divided by a factor (position interpolation, arXiv:2306.15595)."""

    kind: Literal["linear"] = "linear"
    factor: PositiveFloat
    """Longer sequences than in training, times this."""


class Llama3(Section):
    """Low frequencies divided by a factor, high ones kept, those between interpolated (Llama 3.1)."""

    kind: Literal["llama3"] = "llama3"
    factor: PositiveFloat
    """Divides the frequencies of long waves."""
    original_positions: PositiveInt
    """Tokens of the sequences that the model was first trained on."""
    low_frequency: PositiveFloat = 1.0
    """Pairs with fewer turns than this within `original_positions` are divided by the whole factor."""
    high_frequency: PositiveFloat = 4.0
    """Pairs with more turns than this stay as they are."""

    @model_validator(mode="after")
    def _band_is_ordered(self) -> Self:
        if self.low_frequency >= self.high_frequency:
            raise ValueError(f"low_frequency {self.low_frequency} is not below high_frequency {self.high_frequency}")
        return self


class YaRN(Section):
    """Low frequencies divided by a factor, high ones kept, with sharper attention (arXiv:2309.00071)."""

    kind: Literal["yarn"] = "yarn"
    factor: Annotated[float, Field(ge=1)]
    """Longer sequences than in training, times this."""
    original_positions: PositiveInt
    """Tokens of the sequences that the model was first trained on."""
    beta_fast: PositiveFloat = 32.0
    """Pairs with more turns than this within `original_positions` stay as they are."""
    beta_slow: PositiveFloat = 1.0
    """Pairs with fewer turns than this are divided by the whole factor."""
    attention_factor: PositiveFloat | None = None
    """Factor of rotated queries and keys; unset, 0.1 · ln(factor) + 1, or by `mscale` and `mscale_all_dim`."""
    mscale: NonNegativeFloat | None = None
    """With `mscale_all_dim`, rotated queries and keys have the quotient of 0.1 · mscale · ln(factor) + 1 and the same
    of `mscale_all_dim` as their factor (DeepSeek)."""
    mscale_all_dim: NonNegativeFloat | None = None
    """In latent attention, scores are multiplied by (0.1 · mscale_all_dim · ln(factor) + 1)²."""

    @model_validator(mode="after")
    def _band_is_ordered(self) -> Self:
        if self.beta_slow >= self.beta_fast:
            raise ValueError(f"beta_slow {self.beta_slow} is not below beta_fast {self.beta_fast}")
        return self

    def sharpen(self, mscale: float | None) -> float:
        """The factor 0.1 · mscale · ln(factor) + 1, which is 1 without an mscale."""
        return 0.1 * (mscale or 0.0) * math.log(self.factor) + 1

    @property
    def rotary_factor(self) -> float:
        """Factor of rotated queries and keys."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self.sharpen(self.mscale) / self.sharpen(self.mscale_all_dim)
        return self.sharpen(1)


class Rope(Section):
    """Rotary positions, half-split pairing (Llama's layout in Hugging Face files)."""

    kind: Literal["rope"] = "rope"
    theta: PositiveFloat = 10_000.0
    """Base of the frequencies."""
    scaling: Annotated[Linear | Llama3 | YaRN, Field(discriminator="kind")] | None = None
    """How the frequencies are changed for longer sequences than the model was first trained on."""


class Learned(Section):
    """A learned vector per absolute position, added to the embedding."""

    kind: Literal["learned"] = "learned"


class Relative(Section):
    """A learned number per head for each range of distances, added to the scores of every layer (arXiv:1910.10683)."""

    kind: Literal["relative"] = "relative"
    buckets: PositiveInt = 32
    """Ranges of distances; where both directions are seen, half of them for each."""
    max_distance: PositiveInt = 128
    """From this distance on, all share the last range."""

    @model_validator(mode="after")
    def _ranges_are_possible(self) -> Self:
        if self.buckets % 4:
            raise ValueError(f"buckets {self.buckets} is no multiple of 4: halves by direction, halves of single steps")
        if self.max_distance <= self.buckets // 2:
            raise ValueError(f"max_distance {self.max_distance} is not above half of buckets {self.buckets}")
        return self


class NoPosition(Section):
    """No position information besides the causal mask."""

    kind: Literal["none"] = "none"
