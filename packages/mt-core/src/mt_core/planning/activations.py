"""What autograd keeps of a forward pass, tensor by tensor (a test compares it with a real block's saved tensors).

Counted for the layers as they are written, without torch.compile, which keeps less; experts are chosen equally often.
Letters as in the model: D model size, F hidden features, H heads, G key/value groups, K head size, V vocabulary rows of
a rank.
"""

from dataclasses import dataclass
from typing import Any

from mt_core.config.run_config import TransformerRun
from mt_core.contracts import TransformerModelConfig
from mt_core.parallel.layout import Layout, experts_of
from mt_core.planning.parameters import rank_vocabulary
from mt_core.planning.precision import BYTES, state_bytes

STATISTICS = {"rms": 1, "layer": 2}
"""fp32 numbers a token that a norm keeps."""
HIDDEN = {"relu": 1}
"""Hidden features kept by a dense layer, in units of F; 2 for all but relu, whose result is all it keeps."""

GRADIENTS = 4
"""Gradients of hidden features that exist at once in a layer's backward pass, in units of F."""


@dataclass(frozen=True, slots=True)
class Kept:
    """One tensor that is kept for the backward pass of one layer and one micro-batch."""

    name: str
    size: float
    """Bytes on this rank."""
    core: bool = False
    """Whether it lies inside the attention core, which selective recompute computes again."""


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes on one rank for one micro-batch."""

    kept: float
    """By all layers, when the forward pass ends."""
    backward: float
    """By the largest group of layers that is computed again, and by gradients, while a layer's backward pass runs."""
    loss: float
    """By the last norm, the logits and their gradient, at the turn from forward to backward."""


def tokens_of(config: TransformerRun, layout: Layout) -> int:
    """Tokens of one micro-batch on one context rank."""
    return layout.micro_batch * config.data.seq_length // layout.dims.context


def layer_kept(config: TransformerRun, layout: Layout) -> list[Kept]:
    """Everything that one layer keeps without recompute."""
    model, tokens = config.model, tokens_of(config, layout)
    a = BYTES[config.precision.dtype]
    between = tokens * model.hidden_size * a / layout.sequence_parts
    statistics = tokens * STATISTICS[model.norm.kind] * max(4, a) / layout.sequence_parts
    return [
        Kept("inputs of both norms", 2 * between),
        Kept("statistics of both norms", 2 * statistics),
        Kept("normalised inputs of qkv and up projection", 2 * between),
        *_attention_kept(config, layout, tokens),
        *(_experts_kept(config, layout) if experts_of(model) else ()),
        *_mlp_kept(model.mlp, hidden(config, layout) * a),
    ]


def routed(config: TransformerRun, layout: Layout) -> float:
    """Rows that the experts of a layer get from one rank in a micro-batch: tokens times experts of each."""
    return tokens_of(config, layout) / layout.sequence_parts * rows_per_token(config.model)


def rows_per_token(model: TransformerModelConfig) -> int:
    """Experts that a token passes through, 0 without experts."""
    return getattr(model.mlp, "top_k", 0)


def hidden(config: TransformerRun, layout: Layout) -> float:
    """Hidden features of one layer on one rank in a micro-batch."""
    part = config.model.mlp
    if experts_of(config.model):
        return routed(config, layout) * part.ffn_hidden_size
    return tokens_of(config, layout) * part.ffn_hidden_size / layout.dims.tensor


def _attention_kept(config: TransformerRun, layout: Layout, tokens: int) -> list[Kept]:
    part, a, n = config.model.attention, BYTES[config.precision.dtype], layout.dims.context
    head = tokens * part.head_size * a
    H, G = part.heads / layout.dims.tensor, max(part.num_kv_heads / layout.dims.tensor, 1)
    kept = [Kept("attention's result", H * head)]
    match layout.exchange if n > 1 else part.core:
        case "ring" | "eager":
            kept.append(Kept("queries, keys, values", (H + 2 * G) * head))
        case "all_gather":
            kept.append(Kept("own queries, all keys and values", (H + 2 * G * n) * head))
            kept.append(Kept("results of both pieces", H * head))
        case "all_to_all":
            kept.append(Kept("exchanged queries, keys, values", (H + 2 * G) * head))
            kept.append(Kept("result before the exchange", H * head))
        case _:  # values, and keys if they are not turned, are views of the product
            kept.append(Kept("product of queries, keys, values", (H + 2 * G) * head))
            if config.model.position.kind == "rope":
                kept.append(Kept("turned queries and keys", (H + G) * head))
            elif H > G:
                kept.append(Kept("queries, made contiguous", H * head))
    if part.core == "eager" and (n == 1 or layout.exchange != "ring"):
        length = config.data.seq_length
        weights = max(4, a) + (a if a < 4 or H > G else 0)  # the softmax, and itself narrow or laid out by group
        return [*kept, Kept("softmax of all scores, mask", H * tokens * length * weights + length**2, core=True)]
    return [*kept, Kept("log-sum-exp of the scores", H * tokens * 4, core=True)]


def _experts_kept(config: TransformerRun, layout: Layout) -> list[Kept]:
    """What a mixture keeps around its experts' hidden features."""
    part: Any = config.model.mlp
    D, a = config.model.hidden_size, BYTES[config.precision.dtype]
    wide, rows = max(4, a), routed(config, layout)
    tokens = rows / part.top_k
    orders = 5 if layout.dims.expert > 1 else 3  # int64: choices, tokens of rows, their order; of exchanged rows, twice
    every = tokens * part.experts
    probabilities = (rows if part.normalized else every) + (every if part.aux_loss_coeff else 0)
    return [
        Kept("input of the router, widened", tokens * D * wide if a < wide else 0),
        Kept("weights of choices, narrow", rows * a if a < wide or not part.normalized else 0),
        Kept("probabilities, and orders of choices", probabilities * wide + rows * 8 * orders),
        Kept("rows into and out of experts", 2 * rows * D * a),
    ]


def _mlp_kept(part: Any, features: float) -> list[Kept]:
    if part.kind in ("gated", "moe"):
        return [
            Kept("gate and up", 2 * features),
            Kept("activated gate", features),
            Kept("input of the down projection", features),
        ]
    return [Kept("hidden features before and after activation", HIDDEN.get(part.activation, 2) * features)]


def activations_of(config: TransformerRun, layout: Layout) -> Activations:
    """Bytes of activations on one rank, with the layout's recompute."""
    parts, layers = layer_kept(config, layout), config.model.layers
    full, core = sum(part.size for part in parts), sum(part.size for part in parts if part.core)
    a, tokens, method = BYTES[config.precision.dtype], tokens_of(config, layout), layout.recompute.method
    between = tokens * config.model.hidden_size * a / layout.sequence_parts
    gradients = GRADIENTS * hidden(config, layout) * a
    size = min(layout.recompute.layers, layers)
    match layout.recompute.granularity, method:
        case "selective", _:
            kept, again = layers * (full - core), core
        case "full", "uniform":
            kept, again = -(-layers // size) * between, size * full
        case "full", _:  # the first layers are computed again, when all others' activations are gone
            kept, again = size * between + (layers - size) * full, full if size == layers else 0.0
        case _:
            kept, again = layers * full, 0.0
    return Activations(kept, again + gradients, 2 * between + _loss(config, layout))


def _loss(config: TransformerRun, layout: Layout) -> float:
    """Whole logits. Compiled: themselves; else three of them, wide, with a cut vocabulary beside the logits."""
    a, wide, tensor = BYTES[config.precision.dtype], state_bytes(config.precision).wide, layout.dims.tensor
    each = a if config.runtime.compile else 3 * wide + (a if tensor > 1 and a < wide else 0)
    return tokens_of(config, layout) * rank_vocabulary(config.model, tensor) * each
