"""Configuration of `GPT`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BeforeValidator, Field, PositiveFloat, model_validator

from mt_core.planning.layer_costs import LayerCosts, RankShape
from mt_models.config.attention import GQA
from mt_models.config.lora import ADAPTERS, LAYERS, Lora
from mt_models.config.mla import MLA
from mt_models.config.mlp import Dense, Gated
from mt_models.config.moe import MoE
from mt_models.config.norm import LayerNorm, RMSNorm
from mt_models.config.position import Learned, NoPosition, Rope
from mt_models.config.tensors import CanonicalTensor, Tensors, matrix_parameters
from mt_models.config.transformer import TransformerSection

if TYPE_CHECKING:
    from mt_models.models.gpt import GPT


def _default_to_gqa(attention: object) -> object:
    return {"kind": "gqa", **attention} if isinstance(attention, Mapping) else attention


class GPTConfig(TransformerSection):
    """A decoder-only transformer with pre-normalised residual blocks."""

    kind: Literal["gpt"] = "gpt"
    attention: Annotated[GQA | MLA, Field(discriminator="kind"), BeforeValidator(_default_to_gqa)]
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
    """Embeddings are multiplied by sqrt(hidden_size), which is rounded to their dtype."""
    logit_softcap: PositiveFloat | None = None
    """Logits l become logit_softcap · tanh(l / logit_softcap); unset, they stay as they are."""
    tied: bool = False
    """The output layer uses the embedding's weight."""
    lora: Lora | None = None
    """Low-rank adapters; unset, there are none."""

    @model_validator(mode="after")
    def _rope_needs_pairs(self) -> Self:
        if self.position.kind == "rope" and (size := self.attention.rotary_size) % 2:
            name = "head_size" if self.attention.kind == "gqa" else "rope_head_size"
            raise ValueError(f"rotary positions need an even attention.{name}, got {size}")
        return self

    @model_validator(mode="after")
    def _some_layer_has_experts(self) -> Self:
        if self.mlp.kind == "moe" and self.mlp.dense_layers >= self.layers:
            raise ValueError(f"mlp.dense_layers {self.mlp.dense_layers} leave none of {self.layers} layers for experts")
        return self

    @model_validator(mode="after")
    def _adapters_have_projections(self) -> Self:
        if self.lora is None:
            return self
        if self.attention.kind != "gqa" or self.mlp.kind == "moe":
            part = "attention.kind" if self.attention.kind != "gqa" else "mlp.kind"
            raise ValueError(f"lora has no adapters for {part} = {getattr(self, part.split('.')[0]).kind!r}")
        known = [target for target, layer in LAYERS.items() if f"{layer}.{target}.weight" in self._plain_tensors(0)]
        if unknown := [target for target in self.lora.targets if target not in known]:
            raise ValueError(f"lora.targets {unknown}: the model's blocks have {', '.join(known)}")
        return self

    @property
    def default_trainable(self) -> tuple[str, ...]:
        """The patterns of what is trained where `optim.trainable` is not set."""
        return ("*",) if self.lora is None else (ADAPTERS,)

    def get_mlp(self, layer: int) -> Dense | Gated | MoE:
        """The feed-forward layer of one block."""
        dense = self.mlp.dense if self.mlp.kind == "moe" and layer < self.mlp.dense_layers else None
        return dense or self.mlp

    def build(self, tensor: int = 1) -> "GPT":
        """The module, parameters uninitialised, on the current default device and dtype; whole, for `tensor` ranks."""
        from mt_models.models.gpt import GPT

        return GPT(self, tensor)

    def canonical_tensors(self) -> Tensors:
        """Every tensor in a checkpoint of this model, un-fused and un-padded."""
        return dict(_list_tensors(self))  # pyright: ignore[reportArgumentType]  # frozen sections are hashable

    @property
    def block_norms(self) -> tuple[str, ...]:
        """Names of the norms of a block, those of heads left out."""
        return ("attn_norm", "mlp_norm", *(("attn_post_norm", "mlp_post_norm") if self.post_norms else ()))

    def block_tensors(self, layer: int) -> Tensors:
        """The canonical tensors of one block, named without its number."""
        tensors = self._plain_tensors(layer)
        return tensors if self.lora is None else tensors | self.lora.tensors(tensors)

    def _plain_tensors(self, layer: int) -> Tensors:
        """The canonical tensors of a block but its adapters."""
        tensors: Tensors = {}
        for name in self.block_norms:
            tensors |= self.norm.tensors(name, self.hidden_size)
        tensors |= self.attention.tensors("attn", self.hidden_size, self.norm)
        return tensors | self.get_mlp(layer).tensors("mlp", self.hidden_size)

    def layer_costs(self, shape: RankShape, layers: Sequence[int] | None = None) -> LayerCosts:
        """What one of these layers costs a rank in one micro-batch, on average, by default of all; post-norms are left
        out."""
        rotary, dropped = self.position.kind == "rope", self.dropout.attention > 0
        attention = self.attention.costs(shape, self.hidden_size, self.norm, rotary=rotary, dropout=dropped)
        norm, mlp = self.norm.costs(shape, self.hidden_size), self._mlp_costs(shape, layers or range(self.layers))
        dropout = self.dropout.costs(shape, self.hidden_size)
        return norm + attention + dropout + norm + mlp + dropout

    def _mlp_costs(self, shape: RankShape, layers: Sequence[int]) -> LayerCosts:
        """The costs of a block's feed-forward layer, on average over these blocks."""
        size, dense = self.hidden_size, self.mlp.dense if self.mlp.kind == "moe" else None
        if self.mlp.kind != "moe" or dense is None:
            return self.mlp.costs(shape, size)
        share = sum(layer < self.mlp.dense_layers for layer in layers) / len(layers)
        if share in (0, 1):
            return (dense if share else self.mlp).costs(shape, size)
        return dense.costs(shape, size).scale(share) + self.mlp.costs(shape, size).scale(1 - share)

    def flops_per_token(self, sequence: int) -> float:
        """Training FLOPs per token: 6 · matrix parameters + 12 · layers · heads · head_size · keys.

        The output layer counts as a matrix, and so do the experts that a token passes through. `keys` are those that a
        token sees on average: half of the sequence, as in docs/benchmarks.md, or fewer in a window.
        """
        return self.layer_flops(sequence, range(self.layers)) + 6 * self.vocab_size * self.hidden_size

    def layer_flops(self, sequence: int, layers: Sequence[int]) -> float:
        """The part of `flops_per_token` that is in these layers."""
        projections = 6 * matrix_parameters(self.attention.tensors("attn", self.hidden_size, self.norm))
        first = self.mlp.dense_layers if self.mlp.kind == "moe" else 0
        dense = sum(layer < first for layer in layers)
        counts = ((self.get_mlp(0), dense), (self.mlp, len(layers) - dense))
        feeding = sum(count * mlp.flops_per_token(self.hidden_size) for mlp, count in counts if count)
        windows = Counter(self.attention.get_window(layer) for layer in layers)
        keys = sum(count * _mean_keys(sequence, window) for window, count in windows.items())
        return len(layers) * projections + feeding + self.attention.score_flops(keys)


def _mean_keys(sequence: int, window: int | None) -> float:
    """Keys that a token of a sequence sees on average, the last one counted at half."""
    width = min(window or sequence, sequence)
    return width * (1 - width / (2 * sequence)) if sequence else 0.0


@lru_cache(maxsize=32)  # plans ask a thousand times
def _list_tensors(config: GPTConfig) -> Tensors:
    tensors = config.vocab_tensors("embed")
    if config.position.kind == "learned":
        tensors["position.weight"] = CanonicalTensor((config.max_seq_len, config.hidden_size))
    for layer in range(config.layers):
        tensors |= {f"layers.{layer}.{name}": tensor for name, tensor in config.block_tensors(layer).items()}
    tensors |= config.norm.tensors("norm", config.hidden_size)
    return tensors if config.tied else tensors | config.vocab_tensors("head")
