"""Which parameters a rank has, in the order of Megatron's named_parameters(), and which optimizer has them.

Flat vectors and ids of parameters count in this order, which depends on whose layers the model is made of. A tensor
that T5 holds under two names (docs/specs/checkpoints.md §3.4) is one parameter.
"""

from collections.abc import Iterator, Mapping
from typing import TypeVar

from mt_ckpt.megatron.args.model_types import as_gpt
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.parameters.experts import count_experts, to_local_expert_index
from mt_ckpt.megatron.parameters.names import EMBED, EXPERT, HEAD, LAYER, Parameter, parameters, second_names
from mt_ckpt.megatron.parameters.replicas import Ranks
from mt_ckpt.megatron.torch_format.writer import locations
from mt_models.config import TransformerConfig

OUTSIDE = (
    EMBED,
    "embedding.position_embeddings.",
    "embedding.tokentype_embeddings.",
    "encoder_relative_pos_emb.",
    "decoder_relative_pos_emb.",
    "encoder.layers.",
    "encoder.final_layernorm.",
    "decoder.layers.",
    "decoder.final_layernorm.",
    "lm_head.dense.",
    "lm_head.layer_norm.",
    "output_layer.",
    "binary_head.",
    "pooler.",
)
LOCAL = (
    "input_layernorm",
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "pre_cross_attn_layernorm",
    "cross_attention.linear_proj",
    "cross_attention.linear_q",
    "cross_attention.linear_kv",
    "pre_mlp_layernorm",
    "mlp.router",
    "mlp.experts",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
ENGINE = (*LOCAL[1:2], LOCAL[0], *LOCAL[2:])
"""Transformer Engine's layers hold the norm before their weight; the first layer built is the projection."""

T = TypeVar("T")


def named_parameters(
    config: TransformerConfig, layout: Layout, expert_rank: int = 0
) -> dict[tuple[int, int], dict[str, tuple[str, Parameter]]]:
    """(stage, chunk) → local name there → name in the whole model and what it is, in Megatron's order.

    A rank numbers its experts from 0, so that local names are the same on all expert ranks.
    """
    ranks = Ranks(1, layout.expert, count_experts(config))
    parameters_by_chunk: dict[tuple[int, int], dict[str, tuple[str, Parameter]]] = {
        (stage, chunk): {} for stage in range(layout.pipeline) for chunk in range(layout.virtual)
    }
    for name, one in sorted(parameters(config).items(), key=lambda pair: _rank(pair[0], layout)):
        if expert_rank not in ranks.owners(one):
            continue
        for stage, chunk, own in owned_locations(config, name, layout):
            parameters_by_chunk[stage, chunk][to_local_expert_index(own, ranks.first_expert(expert_rank))] = name, one
    return parameters_by_chunk


def owned_locations(config: TransformerConfig, name: str, layout: Layout) -> Iterator[tuple[int, int, str]]:
    """Stage, chunk and name there, of a parameter."""
    return (place for place in locations(config, name, layout) if place[2] not in second_names(config, name))


def by_optimizer(parameters: Mapping[str, T], expert_ranks: int) -> list[dict[str, T]]:
    """The parameters of each optimizer: where several ranks share the experts, these have one of their own.

    Source: docs/specs/checkpoints.md §1.4.
    """
    if expert_ranks == 1:
        return [dict(parameters)]
    return [
        {name: one for name, one in parameters.items() if is_expert_parameter(name) == experts}
        for experts in (False, True)
    ]


def is_expert_parameter(name: str) -> bool:
    """Whether a name of Megatron's is that of an expert's tensor."""
    return ".mlp.experts." in name


def tied_across_stages(config: TransformerConfig, stages: int) -> tuple[str, ...]:
    """Names that have a bucket of their own: a tied embedding and its copy on another stage."""
    return (EMBED, HEAD) if as_gpt(config).tied and stages > 1 else ()


def _rank(name: str, layout: Layout) -> tuple[int, ...]:
    outside = next(n for n, known in enumerate(OUTSIDE) if name.startswith(known))
    if not (number := LAYER.match(name)):
        return outside, name.endswith(".bias")
    order = ENGINE if layout.engine else LOCAL
    if expert := EXPERT.search(name):
        within = int(expert[1]), name.endswith("linear_fc2.weight")
        return outside, int(number[1]), order.index("mlp.experts"), *(reversed(within) if layout.grouped else within)
    module, _, leaf = name[number.end() :].rpartition(".")
    return outside, int(number[1]), order.index(module), leaf == "bias"
