"""Names that the old classes gave to tensors, and Megatron-Core's local names for them.

Source: docs/specs/checkpoints.md §3.1.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from mt_ckpt.megatron.parameters.names import LAYER, OUTPUT_LAYER
from mt_ckpt.megatron.parameters.table import COPIES

BLOCK: Mapping[str, tuple[str, ...]] = {
    "input_layernorm.": ("input_norm.", "input_layernorm.", "self_attention.layernorm_qkv.layer_norm_"),
    "self_attention.linear_qkv.": (
        "self_attention.query_key_value.",
        "attention.query_key_value.",
        "self_attention.layernorm_qkv.",
    ),
    "self_attention.linear_proj.": ("self_attention.dense.", "attention.dense.", "self_attention.proj."),
    "pre_mlp_layernorm.": ("post_attention_norm.", "post_attention_layernorm.", "layernorm_mlp.layer_norm_"),
    "mlp.linear_fc1.": ("mlp.dense_h_to_4h.", "layernorm_mlp.fc1_"),
    "mlp.linear_fc2.": ("mlp.dense_4h_to_h.", "layernorm_mlp.fc2_"),
}
"""Within a layer, what precedes weight or bias: ours to the newest of theirs, older ones and Transformer Engine's."""
CROSS: Mapping[str, tuple[str, ...]] = {
    **BLOCK,
    "pre_cross_attn_layernorm.": ("post_attention_norm.", "post_attention_layernorm."),
    "cross_attention.linear_q.": ("inter_attention.query.",),
    "cross_attention.linear_kv.": ("inter_attention.key_value.",),
    "cross_attention.linear_proj.": ("inter_attention.dense.",),
    "pre_mlp_layernorm.": ("post_inter_attention_norm.", "post_inter_attention_layernorm."),
}
"""Names within a layer of T5's decoder, where other parts come after attention."""
OUTSIDE: Mapping[str, tuple[str, ...]] = {
    "embedding.": ("language_model.embedding.",),
    "encoder.final_layernorm.": ("language_model.encoder.final_norm.", "language_model.encoder.final_layernorm."),
    "decoder.final_layernorm.": ("language_model.decoder.final_norm.", "language_model.decoder.final_layernorm."),
    "output_layer.": ("language_model.output_layer.", "word_embeddings_for_head."),
    "output_layer.bias": ("lm_head.bias",),
    "lm_head.dense.": ("lm_head.dense.",),
    "lm_head.layer_norm.": ("lm_head.norm.", "lm_head.layernorm."),
    "pooler.": ("language_model.pooler.",),
    "binary_head.": ("binary_head.",),
    "classification_head.": ("classification_head.",),
    "multichoice_head.": ("multichoice_head.",),
}
TIED = "word_embeddings_for_head."
"""The last stage's copy of a tied embedding."""
OLDEST = re.compile(r"^language_model\.transformer\.")
"""The encoder's name in the first releases."""
STACK, THEIR_LAYER = "language_model.encoder.", re.compile(r"^language_model\.((?:en|de)coder\.layers\.\d+\.)")
DICTS = (
    "language_model.embedding.word_embeddings.",
    "language_model.embedding.position_embeddings.",
    "language_model.embedding.tokentype_embeddings.",
    STACK,
    "language_model.decoder.",
    "language_model.output_layer.",
    "language_model.pooler.",
    TIED,
    "lm_head.",
    "binary_head.",
    "classification_head.",
    "multichoice_head.",
)
"""What is a dict of its own in a file; the names in it keep their dots."""


def core_state(model: Mapping[str, Any], kind: str = "gpt") -> dict[str, Tensor]:
    """A file's nested model, flat and under Core's names; its kind is gpt, bert or t5.

    A name that is in no table, or a second one for the same tensor, stays: the loader then tells of it as unexpected.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in flat(model):
        ours = core_name(name, kind)
        state[name if ours in state else ours] = tensor
    return state


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested dicts by their dotted names."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            yield prefix + name, value


def core_name(name: str, kind: str = "gpt") -> str:
    """Megatron-Core's local name for an old one. The old classes call GPT's only stack an encoder, Core a decoder."""
    name = OLDEST.sub(STACK, name)
    layer = THEIR_LAYER.match(name)
    start, rest = (layer[1], name[layer.end() :]) if layer else ("", name)
    known = {theirs: ours for ours, spellings in _table(start).items() for theirs in spellings}
    fitting = max((theirs for theirs in known if rest.startswith(theirs)), key=len, default=None)
    if fitting is None:
        return name
    local = start + known[fitting] + rest.removeprefix(fitting)
    return f"decoder.{local.removeprefix('encoder.')}" if kind == "gpt" and local.startswith("encoder.") else local


def _table(layer: str) -> Mapping[str, tuple[str, ...]]:
    """The names in a layer, or outside of layers."""
    return CROSS if layer.startswith("decoder.") else BLOCK if layer else OUTSIDE


def legacy_model(state: Mapping[str, Any], kind: str, *, tied: bool) -> dict[str, Any]:
    """Tensors under Core's local names, nested under the old classes' newest names, each once."""
    model: dict[str, Any] = {}
    for name, tensor in state.items():
        if name.endswith("_extra_state") or name.startswith(tuple(COPIES.values())):
            continue
        theirs = legacy_name(name, kind, tied=tied)
        start = next(start for start in DICTS if theirs.startswith(start))
        inner = model
        for key in start.removesuffix(".").split("."):
            inner = inner.setdefault(key, {})
        inner[theirs.removeprefix(start)] = tensor
    return model


def legacy_name(name: str, kind: str = "gpt", *, tied: bool) -> str:
    """The newest of the old names for Core's local name."""
    if name == OUTPUT_LAYER and tied:
        return f"{TIED}weight"
    if kind == "gpt" and name.startswith("decoder."):
        name = f"encoder.{name.removeprefix('decoder.')}"
    layer = LAYER.match(name)
    start, rest = (layer[0], name[layer.end() :]) if layer else ("", name)
    table = _table(start)
    ours = max((ours for ours in table if rest.startswith(ours)), key=len)
    return (f"language_model.{start}" if layer else "") + table[ours][0] + rest.removeprefix(ours)
