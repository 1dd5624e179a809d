"""Configuration of `GPT` as parts; torch-free, so `mt config` starts fast.

A family (GPT-2, Llama, Mistral, …) is a preset of these values, never a name in code.
"""

import math
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from mt_core.config.section import Section

if TYPE_CHECKING:
    from mt_models.gpt import GPT


class GQA(Section):
    """Grouped-query attention; `kv_groups == heads` is multi-head, `kv_groups == 1` multi-query attention."""

    kind: Literal["gqa"] = "gqa"
    heads: PositiveInt
    """Query heads."""
    kv_groups: PositiveInt
    """Key/value heads; divides `heads`."""
    head_size: PositiveInt
    """Features per head."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections."""
    out_bias: bool = False
    """A bias on the output projection."""
    core: str = "auto"
    """Attention core: a component of kind `attention`, or "auto" for the fastest that runs here."""

    @model_validator(mode="after")
    def _groups_divide_heads(self) -> Self:
        if self.heads % self.kv_groups:
            raise ValueError(f"kv_groups {self.kv_groups} does not divide heads {self.heads}")
        return self


class Dense(Section):
    """Feed-forward layer: down(activation(up(x)))."""

    kind: Literal["dense"] = "dense"
    size: PositiveInt
    """Hidden features."""
    activation: Literal["gelu", "gelu_tanh", "relu", "squared_relu", "silu"] = "gelu_tanh"
    """Function between the projections; "gelu_tanh" is GPT-2's approximation."""
    bias: bool = False
    """Biases on both projections."""


class Gated(Section):
    """Gated feed-forward layer: down(activation(gate(x)) * up(x)); with silu it is SwiGLU, with gelu GeGLU."""

    kind: Literal["gated"] = "gated"
    size: PositiveInt
    """Hidden features."""
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    """Function of the gate."""
    bias: bool = False
    """Biases on all three projections."""


class RMSNorm(Section):
    """x / sqrt(mean(x²) + eps) · weight."""

    kind: Literal["rms"] = "rms"
    eps: PositiveFloat = 1e-5
    """Added to the mean of the squares."""


class LayerNorm(Section):
    """(x − mean) / sqrt(var + eps) · weight + bias."""

    kind: Literal["layer"] = "layer"
    eps: PositiveFloat = 1e-5
    """Added to the variance."""


class Rope(Section):
    """Rotary positions, half-split pairing (Llama's layout in Hugging Face files)."""

    kind: Literal["rope"] = "rope"
    theta: PositiveFloat = 10_000.0
    """Base of the frequencies."""


class Learned(Section):
    """A learned vector per absolute position, added to the embedding."""

    kind: Literal["learned"] = "learned"


class NoPosition(Section):
    """No position information besides the causal mask."""

    kind: Literal["none"] = "none"


class GPTConfig(Section):
    """A decoder-only transformer with pre-normalised residual blocks."""

    kind: Literal["gpt"] = "gpt"
    layers: PositiveInt
    """Transformer blocks."""
    model_size: PositiveInt
    """Width of the residual stream."""
    vocab_size: PositiveInt
    """Token ids, before padding."""
    max_positions: PositiveInt
    """Longest sequence in tokens."""
    attention: GQA
    """Attention of every block."""
    mlp: Annotated[Dense | Gated, Field(discriminator="kind")]
    """Feed-forward layer of every block."""
    norm: Annotated[RMSNorm | LayerNorm, Field(discriminator="kind")]
    """Before attention and feed-forward layer of every block, and before the output layer."""
    position: Annotated[Rope | Learned | NoPosition, Field(discriminator="kind")]
    """How the model knows where a token stands."""
    tied: bool = False
    """The output layer uses the embedding's weight."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights; projections into the residual stream use init_std / sqrt(2 · layers)."""
    vocab_divisor: PositiveInt = 128
    """Embedding and output rows are padded to a multiple of this inside the module; padding never gets probability."""

    @model_validator(mode="after")
    def _rope_needs_pairs(self) -> Self:
        if self.position.kind == "rope" and self.attention.head_size % 2:
            raise ValueError(f"rotary positions need an even attention.head_size, got {self.attention.head_size}")
        return self

    def vocab_rows(self, tensor: int = 1) -> int:
        """Rows of the embedding in memory, over all of `tensor` ranks."""
        unit = self.vocab_divisor * tensor
        return -(-self.vocab_size // unit) * unit

    def group_copies(self, tensor: int) -> int:
        """How many of `tensor` ranks hold the same key/value group."""
        return max(1, tensor // self.attention.kv_groups)

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.attention.heads // self.attention.kv_groups

    def build(self, tensor: int = 1) -> "GPT":
        """The module, parameters uninitialised, on the current default device and dtype; whole, for `tensor` ranks."""
        from mt_models.gpt import GPT

        return GPT(self, tensor)

    def canonical_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor in a checkpoint of this model: un-fused and un-padded."""
        shapes = {"embed.weight": (self.vocab_size, self.model_size)}
        if self.position.kind == "learned":
            shapes["position.weight"] = (self.max_positions, self.model_size)
        for n in range(self.layers):
            shapes |= {f"layers.{n}.{name}": shape for name, shape in self._block_shapes().items()}
        shapes |= self._norm_shapes("norm")
        if not self.tied:
            shapes["head.weight"] = (self.vocab_size, self.model_size)
        return shapes

    @property
    def parameter_count(self) -> int:
        """Parameters, without padding; a tied weight counts once."""
        return sum(map(math.prod, self.canonical_shapes().values()))

    def _norm_shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        parts = ("weight", "bias") if self.norm.kind == "layer" else ("weight",)
        return {f"{name}.{part}": (self.model_size,) for part in parts}

    def _block_shapes(self) -> dict[str, tuple[int, ...]]:
        attention, mlp, D = self.attention, self.mlp, self.model_size
        queries, keys = attention.heads * attention.head_size, attention.kv_groups * attention.head_size
        linears = [
            ("attn.q", queries, D, attention.qkv_bias),
            ("attn.k", keys, D, attention.qkv_bias),
            ("attn.v", keys, D, attention.qkv_bias),
            ("attn.out", D, queries, attention.out_bias),
            *([("mlp.gate", mlp.size, D, mlp.bias)] if mlp.kind == "gated" else []),
            ("mlp.up", mlp.size, D, mlp.bias),
            ("mlp.down", D, mlp.size, mlp.bias),
        ]
        shapes = self._norm_shapes("attn_norm") | self._norm_shapes("mlp_norm")
        for name, out, into, bias in linears:
            shapes[f"{name}.weight"] = (out, into)
            if bias:
                shapes[f"{name}.bias"] = (out,)
        return shapes

    def flops_per_token(self, sequence: int) -> float:
        """Training FLOPs per token: 6 · matrix parameters + 6 · layers · heads · head_size · sequence.

        The output layer counts as a matrix; causal attention is counted at half, as in docs/benchmarks.md.
        """
        shapes = self._block_shapes()
        matrices = self.layers * sum(s[0] * s[1] for s in shapes.values() if len(s) == 2)
        matrices += self.vocab_size * self.model_size
        return 6.0 * matrices + 6.0 * self.layers * self.attention.heads * self.attention.head_size * sequence
