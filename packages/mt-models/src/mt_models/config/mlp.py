"""Feed-forward layers as parts of a model."""

from collections.abc import Iterator
from typing import Literal, Self

from pydantic import NonNegativeFloat, PositiveInt, model_validator

from mt_core.config.sections import Section
from mt_core.parallel.cuts import CutSize, TensorCut
from mt_core.planning.layer_costs import LayerCosts, RankShape, SavedTensor
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

DENSE_TRAFFIC, GATED_TRAFFIC = {True: (2, 3), False: (2, 3)}, {True: (3, 5), False: (5, 13)}
"""Elements read and written for each hidden feature by the activation, and in gated layers the product with it, forward
and backward, by whether they are compiled."""
ROUTED_TRAFFIC = 7
"""Elements read and written for each feature of an expert's row: gathered 2, put back 2, weighted 2, added up 1."""
GRADIENTS = 4
"""Gradients of hidden features that exist at once in the backward pass of a layer."""


def gated_costs(shape: RankShape, features: float) -> LayerCosts:
    """The costs of a gated layer between its projections, with so many hidden features of all tokens."""
    size, (forward, backward) = features * shape.element_size, GATED_TRAFFIC[shape.compiled]
    return LayerCosts(
        saved=(
            SavedTensor("gate and up", 2 * size),
            SavedTensor("activated gate", size),
            SavedTensor("input of the down projection", size),
        ),
        gradient_bytes=GRADIENTS * size,
        forward_bytes=forward * size,
        backward_bytes=backward * size,
    )


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

    def cut_sizes(self, key: str) -> list[CutSize]:
        """The sizes that tensor ranks divide, under the part's key in the configuration."""
        return [CutSize(f"{key}.ffn_hidden_size", self.ffn_hidden_size)]

    def flops_per_token(self, size: int) -> int:
        """Training FLOPs of a token in the projections."""
        return 6 * matrix_parameters(self.tensors("mlp", size))

    def costs(self, shape: RankShape, size: int) -> LayerCosts:
        """The costs of the layer between its norm and the residual sum."""
        del size
        hidden = shape.tokens * self.ffn_hidden_size / shape.tensor * shape.element_size
        forward, backward = DENSE_TRAFFIC[shape.compiled]
        saved = 1 if self.activation == "relu" else 2  # the result of relu is all that it saves
        return LayerCosts(
            saved=(SavedTensor("hidden features before and after activation", saved * hidden),),
            gradient_bytes=GRADIENTS * hidden,
            forward_bytes=forward * hidden,
            backward_bytes=backward * hidden,
            tensor_reductions=1,
        )


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

    def cut_sizes(self, key: str) -> list[CutSize]:
        """The sizes that tensor ranks divide, under the part's key in the configuration."""
        return [CutSize(f"{key}.ffn_hidden_size", self.ffn_hidden_size)]

    def flops_per_token(self, size: int) -> int:
        """Training FLOPs of a token in the projections."""
        return 6 * matrix_parameters(self.tensors("mlp", size))

    def costs(self, shape: RankShape, size: int) -> LayerCosts:
        """The costs of the layer between its norm and the residual sum."""
        del size
        features = shape.tokens * self.ffn_hidden_size / shape.tensor
        return LayerCosts(tensor_reductions=1) + gated_costs(shape, features)


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

    def cut_sizes(self, key: str) -> list[CutSize]:
        """The number of experts, which expert ranks divide, under the part's key in the configuration."""
        return [CutSize(f"{key}.experts", self.experts, axis="expert")]

    def flops_per_token(self, size: int) -> int:
        """Training FLOPs of a token in the router and in the experts that it passes through."""
        return 6 * self.experts * size + self.expert_flops(size)

    def costs(self, shape: RankShape, size: int) -> LayerCosts:
        """The costs of the mixture between its norm and the residual sum, if experts are chosen equally often.

        Tensor ranks have whole experts: they compute the same, unless they divide the sequence.
        """
        tokens = shape.tokens / shape.sequence_parts
        rows = tokens * self.top_k
        routed = rows * size * shape.element_size
        return LayerCosts(
            saved=(
                *self._saved_by_router(shape, tokens, size),
                SavedTensor("rows into and out of experts", 2 * routed),
            ),
            forward_bytes=ROUTED_TRAFFIC * routed,
            backward_bytes=ROUTED_TRAFFIC * routed,
            repeated_flops=self.expert_flops(size) * (shape.tensor / shape.sequence_parts - 1),
            routed_bytes=routed,
        ) + gated_costs(shape, rows * self.ffn_hidden_size)

    def _saved_by_router(self, shape: RankShape, tokens: float, size: int) -> Iterator[SavedTensor]:
        wide, narrow = shape.wide_size, shape.element_size < shape.wide_size
        rows, choices = tokens * self.top_k, tokens * self.experts
        orders = 5 if shape.expert > 1 else 3  # int64: choices, tokens of rows, their order; of exchanged rows, twice
        probabilities = (rows if self.normalized else choices) + (choices if self.aux_loss_coeff else 0)
        yield SavedTensor("input of the router, widened", tokens * size * wide if narrow else 0)
        yield SavedTensor(
            "weights of choices, narrow", rows * shape.element_size if narrow or not self.normalized else 0
        )
        yield SavedTensor("probabilities, and orders of choices", probabilities * wide + rows * 8 * orders)

    def expert_flops(self, size: int) -> int:
        """Training FLOPs of a token in its experts."""
        return 6 * self.top_k * 3 * self.ffn_hidden_size * size
