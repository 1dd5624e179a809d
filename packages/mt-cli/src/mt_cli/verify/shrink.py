"""A configuration made small enough for CPU ranks, every feature of it kept. Torch-free.

Sizes shrink to the smallest that are cut the same way: what was repeated, or more than one for each rank, stays so.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import lcm
from typing import Any

from mt_cli.verify.layouts import count_chunks
from mt_core.config.loading import merge
from mt_core.config.run_config import TransformerRun
from mt_core.parallel.layout import Layout, axis_problems
from mt_models.config import GQA, MLA, MoE, T5Config

HEAD_SIZE = 8
LATENT = 12
VOCABULARY = 251
"""A prime: no multiple of any padding unit."""
VOCABULARY_DIVISOR = 4
TOKENS = 32
EPS = 1e-4
"""Adam divides by |gradient| + eps: with less, a gradient that is nothing but rounding becomes a whole step."""


def shrink(config: TransformerRun, layouts: Sequence[Layout]) -> Any:
    """The small twin of a configuration that each of `layouts` can cut; they must be able to cut the whole one.

    `parallel` stays as it is. The optimizer and precision are kept, but for `optim.eps`; the batch has at least two
    micro-batches a rank, and nothing is compiled.
    """
    changes = {
        "model": _model(config, layouts),
        "recompute": {"layers": recompute_layers(config)[1]},
        "data": {"seq_length": _seq_length(config, layouts)},
        "batch": _batch(config, layouts),
        "optim": {"eps": max(config.optim.eps, EPS)},
        "runtime": {"compile": False, "device": "cpu"},
    }
    return type(config).model_validate(merge(config.model_dump(), changes))


def _model(config: TransformerRun, layouts: Sequence[Layout]) -> Mapping[str, Any]:
    model = config.model
    groups, queries = heads(config, layouts)
    attention = _attention(config, groups, queries)
    width = model.attention.heads * model.attention.head_size
    size = groups * queries * attention.head_size + (0 if model.hidden_size == width else 4)
    cut = lcm(*(layout.dims.tensor for layout in layouts))
    hidden = min(
        max(round(model.mlp.ffn_hidden_size / model.hidden_size * size / cut), 1) * cut, model.mlp.ffn_hidden_size
    )
    length = _seq_length(config, layouts)
    layers = min(recompute_layers(config)[0] * _count_stages(config, layouts), model.layers)
    decoder = {"decoder_layers": min(model.decoder_layers, layers)} if isinstance(model, T5Config) else {}
    gain = model.init_std * model.hidden_size**0.5  # of a matrix; above 1, softmax saturates and makes rounding larger
    return {
        "layers": layers,
        **decoder,
        "hidden_size": min(size, model.hidden_size),
        "vocab_size": min(model.vocab_size, VOCABULARY),
        "vocab_divisor": min(model.vocab_divisor, VOCABULARY_DIVISOR),
        "max_seq_len": length if model.max_seq_len == config.data.seq_length else length + 4,
        "attention": attention.model_dump(),
        "mlp": {"ffn_hidden_size": hidden, **_extra_layers(model.mlp, hidden, layers)},
        "init_std": min(gain, 1.0) / size**0.5,
    }


def _extra_layers(mlp: object, hidden: int, layers: int) -> Mapping[str, int]:
    """What a mixture of experts has besides experts: as wide as those, and leaving a layer for them."""
    if not isinstance(mlp, MoE):
        return {}
    names = ("shared_ffn_hidden_size", "dense_ffn_hidden_size")
    widths = {name: min(hidden, width) for name in names if (width := getattr(mlp, name)) is not None}
    return {**widths, "dense_layers": min(mlp.dense_layers, layers - 1)}


def _attention(config: TransformerRun, groups: int, queries: int) -> GQA | MLA:
    """Attention of so many heads, as small as it can be and still have what the whole one has."""
    part = _resize(config, groups, queries)
    names = ("head_size",) if part.kind == "gqa" else ("nope_head_size", "rope_head_size", "v_head_size")
    sizes = {name: min(getattr(part, name), HEAD_SIZE - getattr(part, name) % 2) for name in names}
    ranks = {name: getattr(part, name) for name in ("q_lora_rank", "kv_lora_rank") if part.kind == "mla"}
    sizes |= {name: min(rank, LATENT) for name, rank in ranks.items() if rank is not None}
    return part.model_copy(update=sizes)


def _resize(config: TransformerRun, groups: int, queries: int) -> GQA | MLA:
    """The configuration's attention with so many heads, which latent attention has no groups of."""
    part = config.model.attention
    assert isinstance(part, GQA | MLA)
    grouped = {"num_kv_heads": groups} if part.kind == "gqa" else {}
    return part.model_copy(update={"heads": groups * queries, **grouped})


def _count_stages(config: TransformerRun, layouts: Sequence[Layout]) -> int:
    """Stages of the longest pipeline, so that each has as many layers as a model without stages."""
    ranks = max(layout.dims.pipeline for layout in layouts)
    return ranks * count_chunks(config) if ranks > 1 else 1


def heads(config: TransformerRun, layouts: Sequence[Layout]) -> tuple[int, int]:
    """The smallest key/value groups and queries per group that are cut as the configuration's are."""
    groups, queries = config.model.attention.num_kv_heads, config.model.attention.queries_per_group
    wanted = [_features(groups, queries, layout) for layout in layouts]
    sizes = ((g, r) for g in range(1, groups + 1) for r in range(1, queries + 1))
    return next(
        (g, r)
        for g, r in sorted(sizes, key=lambda size: (size[0] * size[1], size))
        if [_features(g, r, layout) for layout in layouts] == wanted and _legal(config, (g, r), layouts)
    )


def _features(groups: int, queries: int, layout: Layout) -> tuple[bool, ...]:
    """What can be seen of heads: are groups repeated, does a rank have several, has a group several queries there?"""
    tensor = layout.dims.tensor
    copies = max(1, tensor // groups)
    return groups > 1, queries > 1, copies > 1, groups > tensor, queries > copies


def _legal(config: TransformerRun, size: tuple[int, int], layouts: Sequence[Layout]) -> bool:
    attention = _resize(config, *size)
    small = config.model_copy(update={"model": config.model.model_copy(update={"attention": attention})})
    about_heads = ("parallel.tensor", "parallel.context")
    return not any(p.where in about_heads for layout in layouts for p in axis_problems(small, layout))


def recompute_layers(config: TransformerRun) -> tuple[int, int]:
    """Layers of the small model, and `recompute.layers` for it: several groups stay several, a last short one stays."""
    layers, size = config.model.layers, config.recompute.layers
    few = min(layers, 2)
    if config.recompute.granularity != "full" or size == 1:
        return few, 1
    if size >= layers:
        return few, few
    if config.recompute.method == "block":
        return (few, 1) if layers - size < 2 and size < 2 else (3, 2)
    return (4, 2) if layers % size == 0 else (3, 2)


def _seq_length(config: TransformerRun, layouts: Sequence[Layout]) -> int:
    unit = lcm(*_units(layouts))
    return min(-(-TOKENS // unit) * unit, config.data.seq_length)


def _units(layouts: Sequence[Layout]) -> Iterator[int]:
    for layout in layouts:
        yield 2 * layout.dims.context
        yield layout.dims.context * layout.sequence_parts


def _batch(config: TransformerRun, layouts: Sequence[Layout]) -> Mapping[str, Any]:
    """Two micro-batches for each data rank of the widest layout, and a whole number for those of each; with a pipeline,
    two for each of its ranks too."""
    micro = min(config.batch.micro_batch, 2)
    samples = 2 * micro * lcm(*(layout.dims.data for layout in layouts))
    samples *= lcm(*(layout.dims.pipeline for layout in layouts))
    return {"micro_batch": micro, "global_batch": samples, "rampup": None, "sizes": None}
