"""Which tensors Megatron-Core's GPT, BERT and T5 have, by module, and what canonical ones each is made of.

Source: docs/specs/checkpoints.md §3.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mt_models.config import TransformerConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """A tensor of Megatron's. Logical shape: as canonical; q, k, v interleaved; gate and up stacked."""

    parts: tuple[str, ...]
    cut: int | None = None
    """The dim, of the logical shape, that tensor ranks cut."""
    expert: int | None = None
    """Which expert of its parts, which are stacked, it belongs to."""
    shapes: tuple[Shape, ...] = ()
    """Shapes of the parts, or of one expert's share of each."""

    @property
    def stacked(self) -> bool:
        """Whether it is gate and up in a dim of their own; queries, keys and values are interleaved by group."""
        return len(self.parts) == 2 and self.cut == 1


GROUPED_ATTENTION = {
    "self_attention.linear_qkv": Parameter(("attn.q", "attn.k", "attn.v"), 0),
    "self_attention.q_layernorm": Parameter(("attn.q_norm",)),
    "self_attention.k_layernorm": Parameter(("attn.k_norm",)),
}
LATENT_ATTENTION = {
    "self_attention.linear_q_proj": Parameter(("attn.q",), 0),
    "self_attention.linear_q_down_proj": Parameter(("attn.q_down",)),
    "self_attention.linear_q_up_proj": Parameter(("attn.q_up",), 0),
    "self_attention.linear_kv_down_proj": Parameter(("attn.kv_down",)),
    "self_attention.linear_kv_up_proj": Parameter(("attn.kv_up",), 0),
    "self_attention.q_layernorm": Parameter(("attn.q_norm",)),
    "self_attention.kv_layernorm": Parameter(("attn.kv_norm",)),
}
"""What projects to queries, keys and values, and norms of these, in attention of either kind.

Source: docs/specs/checkpoints.md §3.7.
"""
DOWN_PROJECTIONS = ("self_attention.linear_q_down_proj.weight", "self_attention.linear_kv_down_proj.weight")
"""Ends of names of tensors that are whole on every rank, but that some layers of Megatron's cut along their rows."""
BLOCK = {
    "input_layernorm": Parameter(("attn_norm",)),
    "self_attention.linear_proj": Parameter(("attn.out",), 1),
    "pre_mlp_layernorm": Parameter(("mlp_norm",)),
    "mlp.shared_experts.linear_fc1": Parameter(("mlp.shared.gate", "mlp.shared.up"), 1),
    "mlp.shared_experts.linear_fc2": Parameter(("mlp.shared.down",), 1),
    "mlp.linear_fc1": Parameter(("mlp.gate", "mlp.up"), 1),
    "mlp.linear_fc2": Parameter(("mlp.down",), 1),
}
EXPERT_BIAS, OUR_EXPERT_BIAS = "mlp.router.expert_bias", "mlp.router.bias"
WHOLE_NAMES = {
    "mlp.router.weight": "mlp.router.weight",
    EXPERT_BIAS: OUR_EXPERT_BIAS,
    "mlp.shared_experts.gate_weight": "mlp.shared_gate.weight",
}
"""Tensors beside experts, theirs to ours; not all end in `weight` or `bias` (docs/specs/checkpoints.md §3.6)."""
EXPERTS = {
    "linear_fc1": Parameter(("mlp.experts.gate", "mlp.experts.up"), 1),
    "linear_fc2": Parameter(("mlp.experts.down",), 1),
}
CROSS = {
    "pre_cross_attn_layernorm": Parameter(("cross_norm",)),
    "cross_attention.linear_q": Parameter(("cross.q",), 0),
    "cross_attention.linear_kv": Parameter(("cross.k", "cross.v"), 0),
    "cross_attention.linear_proj": Parameter(("cross.out",), 1),
}
"""What a layer of T5's decoder has besides (docs/specs/checkpoints.md §3.4)."""
TASK_HEADS = {"classification": "classification_head", "multiple_choice": "multichoice_head"}
"""Modules of the old classes for tasks, by our kind of the head; Megatron-Core has none."""
OUTSIDE = {
    "embedding.word_embeddings": Parameter(("embed",), 0),
    "embedding.position_embeddings": Parameter(("position",)),
    "embedding.tokentype_embeddings": Parameter(("token_type",)),
    "encoder_relative_pos_emb.relative_attention_bias": Parameter(("encoder.relative",)),
    "decoder_relative_pos_emb.relative_attention_bias": Parameter(("decoder.relative",)),
    "lm_head.dense": Parameter(("lm_head.dense",)),
    "lm_head.layer_norm": Parameter(("lm_head.norm",)),
    "output_layer": Parameter(("head",), 0),
    "binary_head": Parameter(("binary_head",)),
    "pooler.dense": Parameter(("pooler",)),
    **{module: Parameter(("task_head",)) for module in TASK_HEADS.values()},
}
"""What models have besides layers; heads but the output layer are whole on every tensor rank.

Source: docs/specs/checkpoints.md §3.3.
"""
COPIES = {
    "embedding.position_embeddings.": "position_embeddings.",
    "output_layer.": "lm_head.output_layer.",
}
"""Modules of T5 that Megatron holds, and stores, under a second name (docs/specs/checkpoints.md §3.4)."""


@dataclass(frozen=True)
class LayerStack:
    """Layers and the norm after them."""

    ours: str
    """What precedes its canonical names."""
    layers: int
    block: Mapping[str, Parameter]


def is_tied(config: TransformerConfig) -> bool:
    """Whether the output layer's weight is the word embedding."""
    return config.kind == "bert" or config.tied


def has_output(config: TransformerConfig) -> bool:
    """Whether the model predicts tokens; a BERT with a task's head does not."""
    return config.kind != "bert" or config.lm_head


def is_buffer(name: str) -> bool:
    """Whether a tensor, of either name, is no parameter: optimizers have no state of it."""
    return name.endswith((EXPERT_BIAS, OUR_EXPERT_BIAS))


def stacks(config: TransformerConfig) -> dict[str, LayerStack]:
    """A model's stacks by Megatron's name."""
    block = BLOCK | (LATENT_ATTENTION if config.attention.kind == "mla" else GROUPED_ATTENTION)
    match config.kind:
        case "gpt":
            return {"decoder": LayerStack("", config.layers, block)}
        case "bert":
            return {"encoder": LayerStack("", config.layers, block)}
        case "t5":
            decoder = LayerStack("decoder.", config.decoder_layers, block | CROSS)
            return {"encoder": LayerStack("encoder.", config.layers, block), "decoder": decoder}
