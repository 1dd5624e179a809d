"""Which parameters a chunk of a pipeline stage has, in the order of Megatron's named_parameters().

Flat vectors and ids of parameters count in this order, which depends on whose layers the model is made of.
"""

from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.names import EMBED, HEAD, LAYER, Parameter, parameters
from mt_ckpt.megatron.rank_files import places
from mt_models.config import GPTConfig

OUTSIDE = (EMBED, "embedding.position_embeddings.weight", "decoder.layers", "decoder.final_layernorm", HEAD)
LOCAL = (
    "input_layernorm",
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "pre_mlp_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
ENGINE = (*LOCAL[1:2], LOCAL[0], *LOCAL[2:])
"""Transformer Engine's layers hold the norm before their weight; the first layer built is the projection."""


def named_parameters(config: GPTConfig, layout: Layout) -> dict[tuple[int, int], dict[str, tuple[str, Parameter]]]:
    """(stage, chunk) → local name there → name in the whole model and what it is, in Megatron's order."""
    order = ENGINE if layout.engine else LOCAL
    found: dict[tuple[int, int], dict[str, tuple[str, Parameter]]] = {
        (stage, chunk): {} for stage in range(layout.pipeline) for chunk in range(layout.virtual)
    }
    for name, one in sorted(parameters(config).items(), key=lambda pair: _rank(pair[0], order)):
        for stage, chunk, own in places(config, name, layout):
            found[stage, chunk][own] = name, one
    return found


def tied_across_stages(config: GPTConfig, layout: Layout) -> tuple[str, ...]:
    """Names that have a bucket of their own: a tied embedding and its copy on another stage."""
    return (EMBED, HEAD) if config.tied and layout.pipeline > 1 else ()


def _rank(name: str, order: tuple[str, ...]) -> tuple[int, ...]:
    outside = next(n for n, known in enumerate(OUTSIDE) if name.startswith(known))
    if not (number := LAYER.match(name)):
        return outside, name.endswith(".bias")
    module, _, leaf = name[number.end() :].rpartition(".")
    return outside, int(number[1]), order.index(module), leaf == "bias"
