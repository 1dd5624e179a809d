"""The order in which Megatron's models have their parameters, that of named_parameters(), whose numbers optimizers use.

It depends on whose layers the model is made of. Transformer Engine's linear layers hold the norm before them, ahead of
their weight; a layer's attention builds the projection of its result first.
"""

from mt_ckpt.megatron.parameters.names import EXPERT, LAYER
from mt_models.config import TransformerConfig

MODULES = (
    "embedding.word_embeddings.weight",
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
    "classification_head.",
    "multichoice_head.",
)
OUT = "self_attention.linear_proj"
AFTER_ATTENTION = (
    "pre_cross_attn_layernorm",
    "cross_attention.linear_proj",
    "cross_attention.linear_q",
    "cross_attention.linear_kv",
    "pre_mlp_layernorm",
    "mlp.router",
    "mlp.experts",
    "mlp.shared_experts",
    "mlp.shared_experts.linear_fc1",
    "mlp.shared_experts.linear_fc2",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
QKV = ("self_attention.linear_qkv", "self_attention.q_layernorm", "self_attention.k_layernorm")
QUERIES = ("self_attention.linear_q_proj", "self_attention.linear_q_down_proj")
EXPANDED = tuple(f"self_attention.linear_{name}_proj" for name in ("q_up", "kv_down", "kv_up"))
FUSED = (
    "self_attention.q_layernorm",
    "self_attention.linear_q_up_proj",
    "self_attention.linear_kv_down_proj",
    "self_attention.kv_layernorm",
    "self_attention.linear_kv_up_proj",
)
LATENT_NORMS = ("self_attention.q_layernorm", "self_attention.kv_layernorm")
ORDERS = {
    ("gqa", False): ("input_layernorm", OUT, *QKV, *AFTER_ATTENTION),
    ("gqa", True): (OUT, "input_layernorm", *QKV, *AFTER_ATTENTION),
    ("mla", False): ("input_layernorm", OUT, *QUERIES, *EXPANDED, *LATENT_NORMS, *AFTER_ATTENTION),
    ("mla", True): ("input_layernorm", OUT, *QUERIES, *FUSED, *AFTER_ATTENTION),
}
"""Modules of a layer by the kind of attention and whether they are Transformer Engine's."""


def sort_key(config: TransformerConfig, name: str, *, engine: bool, grouped: bool) -> tuple[int, ...]:
    """Key that sorts local names of the whole model as named_parameters() of its stages does.

    `engine`: layers are Transformer Engine's; `grouped`: a layer's experts are one module of it.
    """
    module = next(number for number, start in enumerate(MODULES) if name.startswith(start))
    if not (layer := LAYER.match(name)):
        return module, name.endswith(".bias")
    order = ORDERS[config.attention.kind, engine]
    if expert := EXPERT.search(name):
        within = int(expert[1]), name.endswith("linear_fc2.weight")
        return module, int(layer[1]), order.index("mlp.experts"), *(reversed(within) if grouped else within)
    part, _, leaf = name[layer.end() :].rpartition(".")
    return module, int(layer[1]), order.index(part), leaf == "bias"
