"""Feed-forward layers as parts of a model."""

from typing import Literal, Self

from pydantic import NonNegativeFloat, PositiveInt, model_validator

from mt_core.config.sections import Section
from mt_core.contracts import TensorCut
from mt_models.config.tensors import (
    INPUTS,
    OUTPUTS,
    CanonicalTensor,
    FusedModule,
    Tensors,
    linear,
    mark_fused,
    matrix_parameters,
)

GATE_UP = FusedModule("gate_up", ("gate", "up"))
"""What gated layers fuse: both projections of their input."""


class Dense(Section):
    """Feed-forward layer: down(activation(up(x)))."""

    kind: Literal["dense"] = "dense"
    ffn_hidden_size: PositiveInt
    """Hidden features."""
    activation: Literal["gelu", "gelu_tanh", "relu", "squared_relu", "silu"] = "gelu_tanh"
    """Function between the projections; "gelu_tanh" is GPT-2's approximation."""
    bias: bool = False
    """Biases on both projections."""

    def tensors(self, name: str, size: int) -> Tensors:
        """The canonical tensors of a layer over `size` features, of which tensor ranks divide the hidden ones."""
        up = linear(f"{name}.up", self.ffn_hidden_size, size, bias=self.bias, cut=OUTPUTS)
        return up | linear(f"{name}.down", size, self.ffn_hidden_size, bias=self.bias, cut=INPUTS)

    def flops_per_token(self, size: int) -> int:
        """Training FLOPs of a token in the projections."""
        return 6 * matrix_parameters(self.tensors("mlp", size))


class Gated(Section):
    """Gated feed-forward layer: down(activation(gate(x)) * up(x)); with silu it is SwiGLU, with gelu GeGLU."""

    kind: Literal["gated"] = "gated"
    ffn_hidden_size: PositiveInt
    """Hidden features."""
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    """Function of the gate."""
    bias: bool = False
    """Biases on all three projections."""

    def tensors(self, name: str, size: int) -> Tensors:
        """The canonical tensors of a layer over `size` features, of which tensor ranks divide the hidden ones."""
        tensors: Tensors = {}
        for projection in GATE_UP.parts:
            tensors |= linear(f"{name}.{projection}", self.ffn_hidden_size, size, bias=self.bias, cut=OUTPUTS)
        down = linear(f"{name}.down", size, self.ffn_hidden_size, bias=self.bias, cut=INPUTS)
        return mark_fused(tensors, name, GATE_UP) | down

    def flops_per_token(self, size: int) -> int:
        """Training FLOPs of a token in the projections."""
        return 6 * matrix_parameters(self.tensors("mlp", size))


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

    def tensors(self, name: str, size: int) -> Tensors:
        """The canonical tensors over `size` features: the router's, which all ranks have, and stacks of the experts'.

        The stacks are divided over the expert axis alone: tensor ranks have whole experts.
        """
        experts, features, cut = self.experts, self.ffn_hidden_size, TensorCut(0, axis="expert")
        tensors = {f"{name}.router.weight": CanonicalTensor((experts, size))}
        for projection in GATE_UP.parts:
            tensors[f"{name}.experts.{projection}.weight"] = CanonicalTensor((experts, features, size), cut, GATE_UP)
        return tensors | {f"{name}.experts.down.weight": CanonicalTensor((experts, size, features), cut)}

    def flops_per_token(self, size: int) -> int:
        """Training FLOPs of a token in the router and in the experts that it passes through."""
        return 6 * self.experts * size + self.expert_flops(size)

    def expert_flops(self, size: int) -> int:
        """Training FLOPs of a token in its experts."""
        return 6 * self.top_k * 3 * self.ffn_hidden_size * size
