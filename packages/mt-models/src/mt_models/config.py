"""Configuration of `GPT` as parts; torch-free, so `mt config` starts fast.

A family (GPT-2, Llama, Mistral, …) is a preset of these values, never a name in code.
"""

import math
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

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
    qk_norm: bool = False
    """Queries and keys pass through a norm of the model's kind, over each head's features, before they are rotated."""
    scale: PositiveFloat | None = None
    """Factor of q·k; unset, 1 / sqrt(head_size)."""
    softcap: PositiveFloat | None = None
    """Scores s become softcap · tanh(s / softcap), which stays within ±softcap; unset, they stay as they are."""
    window: PositiveInt | None = None
    """Tokens that a token sees, itself included; unset, all before it."""
    window_layers: tuple[bool, ...] | None = None
    """Which layers have the window, as a pattern that is repeated over the layers; unset, all."""
    core: str = "auto"
    """Attention core: a component of kind `attention`, or "auto" for the fastest that runs here."""

    @model_validator(mode="after")
    def _groups_divide_heads(self) -> Self:
        if self.heads % self.kv_groups:
            raise ValueError(f"kv_groups {self.kv_groups} does not divide heads {self.heads}")
        return self

    @model_validator(mode="after")
    def _window_layers_choose(self) -> Self:
        if self.window_layers is None:
            return self
        if self.window is None:
            raise ValueError("window_layers says which layers have a window, but window is not set")
        if True not in self.window_layers:
            raise ValueError(f"window {self.window} is used nowhere: window_layers names no layer")
        return self

    def window_of(self, layer: int) -> int | None:
        """The window of one layer, None if it sees everything."""
        pattern = self.window_layers or (True,)
        return self.window if pattern[layer % len(pattern)] else None

    @property
    def special_scores(self) -> list[str]:
        """Names of the settings that make scores something else than q·k / sqrt(head_size) under a causal mask."""
        return [name for name in ("scale", "softcap", "window") if getattr(self, name) is not None]


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


class MoE(Section):
    """A mixture of gated feed-forward layers: each token passes through the `top_k` experts that its router prefers."""

    kind: Literal["moe"] = "moe"
    size: PositiveInt
    """Hidden features of each expert."""
    experts: PositiveInt
    """Feed-forward layers to choose from."""
    top_k: PositiveInt
    """Experts of a token."""
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    """Function of the gate."""
    normalized: bool = True
    """The weights of a token's experts add up to one: a softmax over their logits. Otherwise over all experts'."""
    balance: NonNegativeFloat = 0.0
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


class RMSNorm(Section):
    """x / sqrt(mean(x²) + eps) · weight."""

    kind: Literal["rms"] = "rms"
    eps: PositiveFloat = 1e-5
    """Added to the mean of the squares."""
    offset: bool = False
    """The factor is 1 + weight, so that a weight of zero changes nothing."""


class LayerNorm(Section):
    """(x − mean) / sqrt(var + eps) · weight + bias."""

    kind: Literal["layer"] = "layer"
    eps: PositiveFloat = 1e-5
    """Added to the variance."""


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
    """Of queries and keys; unset, 0.1 · ln(factor) + 1."""

    @model_validator(mode="after")
    def _band_is_ordered(self) -> Self:
        if self.beta_slow >= self.beta_fast:
            raise ValueError(f"beta_slow {self.beta_slow} is not below beta_fast {self.beta_fast}")
        return self


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
    mlp: Annotated[Dense | Gated | MoE, Field(discriminator="kind")]
    """Feed-forward layer of every block."""
    norm: Annotated[RMSNorm | LayerNorm, Field(discriminator="kind")]
    """Before attention and feed-forward layer of every block, and before the output layer."""
    position: Annotated[Rope | Learned | NoPosition, Field(discriminator="kind")]
    """How the model knows where a token stands."""
    post_norms: bool = False
    """Further norms after attention and feed-forward layer, before their output is added."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by sqrt(model_size), which is rounded to their dtype."""
    logit_softcap: PositiveFloat | None = None
    """Logits l become logit_softcap · tanh(l / logit_softcap); unset, they stay as they are."""
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
        shapes |= self._norm_shapes("norm", self.model_size)
        if not self.tied:
            shapes["head.weight"] = (self.vocab_size, self.model_size)
        return shapes

    @property
    def parameter_count(self) -> int:
        """Parameters, without padding; a tied weight counts once."""
        return sum(map(math.prod, self.canonical_shapes().values()))

    def _norm_shapes(self, name: str, size: int) -> dict[str, tuple[int, ...]]:
        parts = ("weight", "bias") if self.norm.kind == "layer" else ("weight",)
        return {f"{name}.{part}": (size,) for part in parts}

    @property
    def block_norms(self) -> dict[str, int]:
        """Names of the norms of a block, and the features that each takes."""
        D, K = self.model_size, self.attention.head_size
        names = {"attn_norm": D, "mlp_norm": D}
        if self.attention.qk_norm:
            names |= {"attn.q_norm": K, "attn.k_norm": K}
        if self.post_norms:
            names |= {"attn_post_norm": D, "mlp_post_norm": D}
        return names

    def _block_shapes(self) -> dict[str, tuple[int, ...]]:
        attention, mlp, D = self.attention, self.mlp, self.model_size
        queries, keys = attention.heads * attention.head_size, attention.kv_groups * attention.head_size
        linears = [
            ("attn.q", queries, D, attention.qkv_bias),
            ("attn.k", keys, D, attention.qkv_bias),
            ("attn.v", keys, D, attention.qkv_bias),
            ("attn.out", D, queries, attention.out_bias),
        ]
        if mlp.kind != "moe":
            linears += [("mlp.gate", mlp.size, D, mlp.bias)] if mlp.kind == "gated" else []
            linears += [("mlp.up", mlp.size, D, mlp.bias), ("mlp.down", D, mlp.size, mlp.bias)]
        shapes: dict[str, tuple[int, ...]] = {}
        for name, size in self.block_norms.items():
            shapes |= self._norm_shapes(name, size)
        for name, out, into, bias in linears:
            shapes[f"{name}.weight"] = (out, into)
            if bias:
                shapes[f"{name}.bias"] = (out,)
        if mlp.kind == "moe":
            shapes["mlp.router.weight"] = (mlp.experts, D)
            shapes |= {f"mlp.experts.{name}.weight": (mlp.experts, mlp.size, D) for name in ("gate", "up")}
            shapes["mlp.experts.down.weight"] = (mlp.experts, D, mlp.size)
        return shapes

    def flops_per_token(self, sequence: int) -> float:
        """Training FLOPs per token: 6 · matrix parameters + 12 · layers · heads · head_size · keys.

        The output layer counts as a matrix, and so do the experts that a token passes through. `keys` are those that a
        token sees on average: half of the sequence, as in docs/benchmarks.md, or fewer in a window.
        """
        shapes = self._block_shapes().values()
        used = self.mlp.top_k if self.mlp.kind == "moe" else 0
        a_block = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
        a_block += used * sum(math.prod(shape[1:]) for shape in shapes if len(shape) == 3)
        matrices = self.layers * a_block
        matrices += self.vocab_size * self.model_size
        windows = (self.attention.window_of(n) for n in range(self.layers))
        keys = sum(_mean_keys(sequence, window) for window in windows)
        return 6.0 * matrices + 12.0 * self.attention.heads * self.attention.head_size * keys


def _mean_keys(sequence: int, window: int | None) -> float:
    """Keys that a token of a sequence sees on average, the last one counted at half."""
    width = min(window or sequence, sequence)
    return width * (1 - width / (2 * sequence)) if sequence else 0.0
