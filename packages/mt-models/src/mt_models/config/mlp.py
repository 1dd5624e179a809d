"""Feed-forward layers as parts of a model."""

from typing import Literal

from pydantic import PositiveInt

from mt_core.config.sections import Section
from mt_core.parallel.cuts import CutSize
from mt_core.planning.layer_costs import LayerCosts, RankShape, SavedTensor
from mt_models.config.tensors import (
    INPUTS,
    OUTPUTS,
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
