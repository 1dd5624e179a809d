"""Canonical names and shapes of the parts that models are composed of, and what they cost.

Outputs come first: a projection from I to O features has a weight (O, I).
"""

import math
from collections.abc import Iterable, Mapping

from mt_models.config.attention import GQA
from mt_models.config.mlp import Dense, Gated, MoE
from mt_models.config.norm import LayerNorm, RMSNorm

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, out: int, into: int, *, bias: bool) -> Shapes:
    """A projection."""
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def norms(part: RMSNorm | LayerNorm, sizes: Mapping[str, int]) -> Shapes:
    """Norms by name, over so many features each."""
    leaves = ("weight", "bias") if part.kind == "layer" else ("weight",)
    return {f"{name}.{leaf}": (size,) for name, size in sizes.items() for leaf in leaves}


def attention(part: GQA, norm: RMSNorm | LayerNorm, size: int, *, name: str = "attn") -> Shapes:
    """The four projections between `size` features and the heads, and the norms of queries and keys."""
    queries, keys = part.heads * part.head_size, part.num_kv_heads * part.head_size
    shapes = norms(norm, {f"{name}.{x}_norm": part.head_size for x in "qk"} if part.qk_norm else {})
    for projection, out in (("q", queries), ("k", keys), ("v", keys)):
        shapes |= linear(f"{name}.{projection}", out, size, bias=part.qkv_bias)
    return shapes | linear(f"{name}.out", size, queries, bias=part.out_bias)


def mlp(part: Dense | Gated | MoE, size: int) -> Shapes:
    """The projections of a feed-forward layer, or of all experts and their router."""
    if part.kind == "moe":
        shapes: Shapes = {"mlp.router.weight": (part.experts, size)}
        shapes |= {f"mlp.experts.{name}.weight": (part.experts, part.ffn_hidden_size, size) for name in ("gate", "up")}
        return shapes | {"mlp.experts.down.weight": (part.experts, size, part.ffn_hidden_size)}
    names = ("mlp.gate", "mlp.up") if part.kind == "gated" else ("mlp.up",)
    shapes = {}
    for name in names:
        shapes |= linear(name, part.ffn_hidden_size, size, bias=part.bias)
    return shapes | linear("mlp.down", size, part.ffn_hidden_size, bias=part.bias)


def repeated(block: Shapes, layers: int, prefix: str = "layers") -> Shapes:
    """The tensors of a block, for each of so many layers."""
    return {f"{prefix}.{n}.{name}": shape for n in range(layers) for name, shape in block.items()}


def padded_rows(vocab_size: int, divisor: int, tensor: int) -> int:
    """Rows of an embedding in memory, over all of `tensor` ranks: a multiple of `divisor` on each."""
    unit = divisor * tensor
    return -(-vocab_size // unit) * unit


def count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Parameters in tensors of these shapes."""
    return sum(map(math.prod, shapes.values()))


def matrix_parameters(shapes: Iterable[tuple[int, ...]], used_experts: int = 0) -> int:
    """Parameters that a token is multiplied with: those of matrices, and of so many of stacked experts."""
    return sum(math.prod(s) if len(s) == 2 else used_experts * math.prod(s[1:]) for s in shapes if len(s) > 1)
