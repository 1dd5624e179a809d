"""Attention as a part of a model."""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, PositiveFloat, PositiveInt, model_validator

from mt_core.config.sections import Section
from mt_core.parallel.cuts import CutSize, TensorCut
from mt_core.planning.layer_costs import LayerCosts, RankShape, SavedTensor
from mt_models.config.norm import LayerNorm, RMSNorm
from mt_models.config.tensors import INPUTS, OUTPUTS, FusedModule, Tensors, linear, mark_fused

QKV, KV = FusedModule("qkv", ("q", "k", "v")), FusedModule("kv", ("k", "v"))
"""What attention fuses: all projections of its input, or where queries come from elsewhere those of keys and values."""

ROTARY_TRAFFIC = {True: (2, 2), False: (9, 9)}
"""Elements read and written for each feature of queries and keys by rotary positions, forward and backward, by whether
they are compiled."""


class GQA(Section):
    """Grouped-query attention; `num_kv_heads == heads` is multi-head, `num_kv_heads == 1` multi-query attention."""

    kind: Literal["gqa"] = "gqa"
    heads: PositiveInt
    """Query heads."""
    num_kv_heads: PositiveInt
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
        if self.heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} does not divide heads {self.heads}")
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

    @property
    def rotary_size(self) -> int:
        """Features per head that are rotated."""
        return self.head_size

    @property
    def cache_sizes(self) -> tuple[int, int, int]:
        """What generation keeps of a token: in how many groups, and how many features of a key and a value."""
        return self.num_kv_heads, self.head_size, self.head_size

    def get_window(self, layer: int) -> int | None:
        """The window of one layer, None if it sees everything."""
        pattern = self.window_layers or (True,)
        return self.window if pattern[layer % len(pattern)] else None

    @property
    def special_scores(self) -> list[str]:
        """Names of the settings that make scores something else than q·k / sqrt(head_size) under a causal mask."""
        return [name for name in ("scale", "softcap", "window") if getattr(self, name) is not None]

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.num_kv_heads

    def tensors(self, name: str, size: int, norm: RMSNorm | LayerNorm, fused: FusedModule = QKV) -> Tensors:
        """The canonical tensors of attention over `size` features: four projections, and norms of queries and keys.

        Tensor ranks divide the heads; of more ranks than key/value heads, several have the same key and value.
        """
        queries, keys = self.heads * self.head_size, self.num_kv_heads * self.head_size
        groups = TensorCut(0, parts=self.num_kv_heads)
        tensors: Tensors = {}
        for x in "qk" if self.qk_norm else "":
            tensors |= norm.tensors(f"{name}.{x}_norm", self.head_size)
        for projection, out, cut in (("q", queries, OUTPUTS), ("k", keys, groups), ("v", keys, groups)):
            tensors |= linear(f"{name}.{projection}", out, size, bias=self.qkv_bias, cut=cut)
        return mark_fused(tensors, name, fused) | linear(f"{name}.out", size, queries, bias=self.out_bias, cut=INPUTS)

    def score_flops(self, keys: float) -> float:
        """Training FLOPs of a token's scores and weighted values, of which it sees so many keys."""
        return 12.0 * self.heads * self.head_size * keys

    def cut_sizes(self, key: str) -> list[CutSize]:
        """The sizes that tensor ranks divide, under the part's key in the configuration; groups may be repeated."""
        heads = CutSize(f"{key}.heads", self.heads, all_to_all=True)
        return [heads, CutSize(f"{key}.num_kv_heads", self.num_kv_heads, repeats=True, all_to_all=True)]

    def costs(
        self, shape: RankShape, size: int, norm: RMSNorm | LayerNorm, *, rotary: bool, dropout: bool = False
    ) -> LayerCosts:
        """The costs of attention between its norm and the residual sum, with or without rotary positions and dropout
        of its probabilities, for which it is written out."""
        del size, norm
        core = "eager" if dropout else self.core
        features = shape.tokens * self.head_size
        heads, groups = self.heads / shape.tensor, max(self.num_kv_heads / shape.tensor, 1)
        forward, backward = ROTARY_TRAFFIC[shape.compiled] if rotary else (0, 0)
        rotated = features * (self.heads + self.num_kv_heads) / shape.tensor * shape.element_size
        return LayerCosts(
            saved=(
                *self._saved_around_core(shape, core, rotary=rotary),
                self._saved_in_core(shape, core, dropout=dropout),
            ),
            forward_bytes=forward * rotated,
            backward_bytes=backward * rotated,
            tensor_reductions=1,
            kv_bytes=2 * groups * features * shape.element_size,
            query_bytes=2 * heads * features * shape.element_size,
        )

    def _saved_around_core(self, shape: RankShape, core: str, *, rotary: bool) -> Iterator[SavedTensor]:
        """What the attention core takes and returns, as the exchange between context ranks lays it out."""
        head = shape.tokens * self.head_size * shape.element_size
        heads, groups = self.heads / shape.tensor, max(self.num_kv_heads / shape.tensor, 1)
        yield SavedTensor("attention's result", heads * head)
        match shape.cp_comm_type if shape.context > 1 else core:
            case "ring" | "eager":
                yield SavedTensor("queries, keys, values", (heads + 2 * groups) * head)
            case "all_gather":
                yield SavedTensor("local queries, all keys and values", (heads + 2 * groups * shape.context) * head)
                yield SavedTensor("results of both pieces", heads * head)
            case "all_to_all":
                yield SavedTensor("exchanged queries, keys, values", (heads + 2 * groups) * head)
                yield SavedTensor("result before the exchange", heads * head)
            case _:  # values, and keys if they are not rotated, are views of the product
                yield SavedTensor("product of queries, keys, values", (heads + 2 * groups) * head)
                if rotary:
                    yield SavedTensor("rotated queries and keys", (heads + groups) * head)
                elif heads > groups:
                    yield SavedTensor("queries, made contiguous", heads * head)

    def _saved_in_core(self, shape: RankShape, core: str, *, dropout: bool) -> SavedTensor:
        """What the attention core saves: all scores if it is written out, else one number for each query."""
        rows, length = self.heads / shape.tensor * shape.tokens, shape.seq_length
        if core != "eager" or (shape.context > 1 and shape.cp_comm_type == "ring"):
            return SavedTensor("log-sum-exp of the scores", rows * 4, core=True)
        narrow = shape.element_size < 4 or self.heads / shape.tensor > max(self.num_kv_heads / shape.tensor, 1)
        copied = narrow or dropout  # in the dtype and layout of the values, and what dropout left of it
        weights = shape.wide_size + (shape.element_size if copied else 0) + (1 if dropout else 0)
        return SavedTensor("softmax of all scores, mask", rows * length * weights + length**2, core=True)

    def count_kv_replicas(self, tensor: int) -> int:
        """How many of `tensor` ranks hold the same key/value group."""
        return max(1, tensor // self.num_kv_heads)


def _no_window(part: GQA) -> GQA:
    if part.window is not None:
        raise ValueError("attention.window is for models in which tokens see only those before them")
    return part


Unwindowed = Annotated[GQA, AfterValidator(_no_window)]
"""Attention to every token."""
