"""Feed-forward layers as parts of a model."""

from typing import Literal, Self

from pydantic import NonNegativeFloat, PositiveInt, model_validator

from mt_core.config.sections import Section


class Dense(Section):
    """Feed-forward layer: down(activation(up(x)))."""

    kind: Literal["dense"] = "dense"
    ffn_hidden_size: PositiveInt
    """Hidden features."""
    activation: Literal["gelu", "gelu_tanh", "relu", "squared_relu", "silu"] = "gelu_tanh"
    """Function between the projections; "gelu_tanh" is GPT-2's approximation."""
    bias: bool = False
    """Biases on both projections."""


class Gated(Section):
    """Gated feed-forward layer: down(activation(gate(x)) * up(x)); with silu it is SwiGLU, with gelu GeGLU."""

    kind: Literal["gated"] = "gated"
    ffn_hidden_size: PositiveInt
    """Hidden features."""
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    """Function of the gate."""
    bias: bool = False
    """Biases on all three projections."""


class MoE(Section):
    """A mixture of gated feed-forward layers: each token passes through the `top_k` experts that its router prefers."""

    kind: Literal["moe"] = "moe"
    ffn_hidden_size: PositiveInt
    """Hidden features of each expert."""
    experts: PositiveInt
    """Feed-forward layers to choose from."""
    top_k: PositiveInt
    """Experts of a token."""
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    """Function of the gate."""
    normalized: bool = True
    """The weights of a token's experts add up to one: a softmax over their logits. Otherwise over all experts'."""
    aux_loss_coeff: NonNegativeFloat = 0.0
    """Coefficient of the loss that evens out, in each sequence, how often experts are chosen."""

    @model_validator(mode="after")
    def _choice_is_possible(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is more than experts {self.experts}")
        if self.top_k == 1 and self.normalized:
            raise ValueError(
                "with top_k 1 the only weight is always 1, and the router learns nothing: normalized = false"
            )
        return self
