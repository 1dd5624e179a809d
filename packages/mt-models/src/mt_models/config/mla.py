"""Multi-head latent attention as a part of a model (arXiv:2405.04434, §2.1).

A query or key head is `nope_head_size` features without positions, then `rope_head_size` features that are rotated; the
rotated ones of keys are the same in all heads. Generation caches the latent and those, not keys and values.
"""

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import PositiveFloat, PositiveInt

from mt_core.config.sections import Section
from mt_core.parallel.cuts import CutSize
from mt_core.planning.layer_costs import LayerCosts, RankShape, SavedTensor
from mt_models.config.attention import ROTARY_TRAFFIC
from mt_models.config.norm import LayerNorm, RMSNorm
from mt_models.config.tensors import INPUTS, OUTPUTS, Tensors, linear, matrix_parameters


class MLA(Section):
    """Multi-head latent attention: keys and values of all heads come from one small vector of a token, its latent."""

    kind: Literal["mla"] = "mla"
    heads: PositiveInt
    """Heads of queries, keys and values."""
    q_lora_rank: PositiveInt | None = None
    """Features that queries are compressed to, and expanded from after a norm; unset, one projection."""
    kv_lora_rank: PositiveInt
    """Features of the latent, which keys and values are expanded from after a norm."""
    nope_head_size: PositiveInt
    """Features per head of queries and keys that know of no position."""
    rope_head_size: PositiveInt
    """Features per head of queries and keys that are rotated; an even number with rotary positions."""
    v_head_size: PositiveInt
    """Features per head of values."""
    norm_eps: PositiveFloat | None = None
    """Added to the mean of the squares, or variance, by the norms of compressed features; unset, `norm.eps`."""
    scale: PositiveFloat | None = None
    """Factor of q·k; unset, 1 / sqrt(nope_head_size + rope_head_size), times YaRN's factor from `mscale_all_dim`."""
    core: str = "auto"
    """Attention core: a component of kind `attention`, or "auto" for the fastest that runs here."""

    qkv_bias: ClassVar[bool] = False
    out_bias: ClassVar[bool] = False
    qk_norm: ClassVar[bool] = False
    softcap: ClassVar[None] = None
    window: ClassVar[None] = None
    window_layers: ClassVar[None] = None
    special_scores: ClassVar[list[str]] = []
    queries_per_group: ClassVar[int] = 1

    def get_window(self, layer: int) -> None:
        """The window of a layer: there is none."""

    @property
    def head_size(self) -> int:
        """Features per head of queries and keys."""
        return self.nope_head_size + self.rope_head_size

    @property
    def rotary_size(self) -> int:
        """Features per head that are rotated."""
        return self.rope_head_size

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads: as many as of queries."""
        return self.heads

    @property
    def cache_sizes(self) -> tuple[int, int, int]:
        """What generation keeps of a token: one key of its latent and of the features that keys of all heads share; the
        latent is the value too."""
        return 1, self.kv_lora_rank + self.rope_head_size, 0

    def count_kv_replicas(self, tensor: int) -> int:
        """How many of `tensor` ranks hold the same key/value head: each has its own."""
        del tensor
        return 1

    def get_norm(self, norm: RMSNorm | LayerNorm) -> RMSNorm | LayerNorm:
        """The norm of compressed features in a model with this norm."""
        return norm.model_copy(update={"eps": self.norm_eps or norm.eps})

    def tensors(self, name: str, size: int, norm: RMSNorm | LayerNorm) -> Tensors:
        """The canonical tensors of attention over `size` features.

        Tensor ranks divide the heads; projections to compressed features, and their norms, are whole on each. Rows of
        `kv_down` are the latent, then the shared features of keys; rows of `kv_up` are each head's key, then its value.
        """
        heads, latent = self.heads, self.kv_lora_rank
        tensors = self._whole_tensors(name, size, norm)
        if self.q_lora_rank is None:
            tensors |= linear(f"{name}.q", heads * self.head_size, size, bias=False, cut=OUTPUTS)
        else:
            tensors |= linear(f"{name}.q_up", heads * self.head_size, self.q_lora_rank, bias=False, cut=OUTPUTS)
        expanded = heads * (self.nope_head_size + self.v_head_size)
        tensors |= linear(f"{name}.kv_up", expanded, latent, bias=False, cut=OUTPUTS)
        return tensors | linear(f"{name}.out", size, heads * self.v_head_size, bias=False, cut=INPUTS)

    def _whole_tensors(self, name: str, size: int, norm: RMSNorm | LayerNorm) -> Tensors:
        norm, tensors = self.get_norm(norm), linear(f"{name}.kv_down", sum(self._down_sizes), size, bias=False)
        tensors |= norm.tensors(f"{name}.kv_norm", self.kv_lora_rank)
        if self.q_lora_rank is not None:
            tensors |= linear(f"{name}.q_down", self.q_lora_rank, size, bias=False)
            tensors |= norm.tensors(f"{name}.q_norm", self.q_lora_rank)
        return tensors

    @property
    def _down_sizes(self) -> tuple[int, int]:
        return self.kv_lora_rank, self.rope_head_size

    def score_flops(self, keys: float) -> float:
        """Training FLOPs of a token's scores and weighted values, of which it sees so many keys."""
        return 6.0 * self.heads * (self.head_size + self.v_head_size) * keys

    def cut_sizes(self, key: str) -> list[CutSize]:
        """The size that tensor ranks divide, under the part's key in the configuration."""
        return [CutSize(f"{key}.heads", self.heads, all_to_all=True)]

    def costs(
        self, shape: RankShape, size: int, norm: RMSNorm | LayerNorm, *, rotary: bool, dropout: bool = False
    ) -> LayerCosts:
        """The costs of attention over `size` features between its norm and the residual sum, with or without rotary
        positions and dropout of its probabilities, for which it is written out."""
        core = "eager" if dropout else self.core
        heads, element = self.heads / shape.tensor * shape.tokens, shape.element_size
        forward, backward = ROTARY_TRAFFIC[shape.compiled] if rotary else (0, 0)
        joined = (forward + 2, backward + 2)  # queries and keys are put together from two parts each
        moved = heads * 2 * self.head_size * element
        whole = self._whole_tensors("attn", size, norm)
        return LayerCosts(
            saved=(
                *self._saved_by_compression(shape, norm),
                *self._saved_around_core(shape, core),
                self._saved_in_core(shape, core, dropout=dropout),
            ),
            forward_bytes=joined[0] * moved,
            backward_bytes=joined[1] * moved,
            tensor_reductions=1,
            repeated_flops=6 * matrix_parameters(whole) * (shape.tensor / shape.sequence_parts - 1),
            kv_bytes=heads * (self.head_size + self.v_head_size) * element,
            query_bytes=heads * (self.head_size + self.v_head_size) * element,
        )

    def _saved_by_compression(self, shape: RankShape, norm: RMSNorm | LayerNorm) -> Iterator[SavedTensor]:
        """Compressed features, before and after their norms, of this rank's part of the sequence."""
        tokens, statistics = shape.tokens / shape.sequence_parts, 1 if norm.kind == "rms" else 2
        compressed = [sum(self._down_sizes), self.kv_lora_rank]
        compressed += [self.q_lora_rank, self.q_lora_rank] if self.q_lora_rank is not None else []
        yield SavedTensor("compressed features, and normalised", tokens * sum(compressed) * shape.element_size)
        yield SavedTensor("their statistics", tokens * statistics * len(compressed) / 2 * shape.wide_size)

    def _saved_around_core(self, shape: RankShape, core: str) -> Iterator[SavedTensor]:
        """What the attention core takes and returns, as the exchange between context ranks lays it out."""
        feature = self.heads / shape.tensor * shape.tokens * shape.element_size
        qk, v = self.head_size * feature, self.v_head_size * feature
        yield SavedTensor("attention's result", v)
        match shape.cp_comm_type if shape.context > 1 else core:
            case "ring" | "eager":
                yield SavedTensor("queries, keys, values", 2 * qk + v)
            case "all_gather":
                yield SavedTensor("local queries, all keys and values", qk + (qk + v) * shape.context)
                yield SavedTensor("results of both pieces", v)
            case "all_to_all":
                yield SavedTensor("exchanged queries, keys, values", 2 * qk + v)
                yield SavedTensor("result before the exchange", v)
            case _:  # values are a view of the product with the latent
                yield SavedTensor("queries, keys", 2 * qk)
                yield SavedTensor("product with the latent", self.nope_head_size * feature + v)

    def _saved_in_core(self, shape: RankShape, core: str, *, dropout: bool) -> SavedTensor:
        """What the attention core saves: all scores if it is written out, else one number for each query."""
        rows, length = self.heads / shape.tensor * shape.tokens, shape.seq_length
        if core != "eager" or (shape.context > 1 and shape.cp_comm_type == "ring"):
            return SavedTensor("log-sum-exp of the scores", rows * 4, core=True)
        copied = shape.element_size < 4 or dropout  # in the dtype of the values, and what dropout left of it
        weights = shape.wide_size + (shape.element_size if copied else 0) + (1 if dropout else 0)
        return SavedTensor("softmax of all scores, mask", rows * length * weights + length**2, core=True)
