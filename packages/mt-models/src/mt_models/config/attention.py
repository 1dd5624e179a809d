"""Attention as a part of a model."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, PositiveFloat, PositiveInt, model_validator

from mt_core.config.sections import Section
from mt_core.contracts import TensorCut
from mt_models.config.norm import LayerNorm, RMSNorm
from mt_models.config.tensors import INPUTS, OUTPUTS, FusedModule, Tensors, linear, mark_fused

QKV, KV = FusedModule("qkv", ("q", "k", "v")), FusedModule("kv", ("k", "v"))
"""What attention fuses: all projections of its input, or where queries come from elsewhere those of keys and values."""


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

    def count_kv_replicas(self, tensor: int) -> int:
        """How many of `tensor` ranks hold the same key/value group."""
        return max(1, tensor // self.num_kv_heads)


def _no_window(part: GQA) -> GQA:
    if part.window is not None:
        raise ValueError("attention.window is for models in which tokens see only those before them")
    return part


Unwindowed = Annotated[GQA, AfterValidator(_no_window)]
"""Attention to every token."""
