"""What Llama and most decoders after it share: names of tensors and keys of config.json.

They agree with us on layout (half-split rotary positions, [out, in] weights), so most tensors are only renamed.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from mt_ckpt.huggingface.families import rope
from mt_ckpt.huggingface.families.family import Key
from mt_ckpt.tensor_streams.names import Names
from mt_models.config import GPTConfig

NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
HEAD_NORMS = {"self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm"}
ATTENTION = {
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.out",
}
MLP = {"mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down"}


def decoder_names(block: Mapping[str, str], also: Mapping[str, str] | None = None) -> Names:
    """Names of a decoder whose blocks have these modules; `also` are further names of theirs for the same modules."""
    return Names(
        {
            "model.embed_tokens.weight": "embed.weight",
            **_in_layers(block),
            "model.norm.weight": "norm.weight",
            "lm_head.weight": "head.weight",
        },
        also=_in_layers(also or {}),
        ignore=(r"\.rotary_emb\.inv_freq$",),  # a buffer in old exports; we compute it
    )


def _in_layers(block: Mapping[str, str]) -> dict[str, str]:
    return {
        f"model.layers.{{n}}.{theirs}.{part}": f"layers.{{n}}.{ours}.{part}"
        for theirs, ours in block.items()
        for part in (("weight",) if "norm" in theirs or "expert" in ours or "router" in ours else ("weight", "bias"))
    }


KEYS = {
    "layers": Key("num_hidden_layers"),
    "hidden_size": Key("hidden_size"),
    "vocab_size": Key("vocab_size"),
    "max_seq_len": Key("max_position_embeddings"),
    "attention.heads": Key("num_attention_heads"),
    "attention.num_kv_heads": Key("num_key_value_heads"),
    "attention.head_size": Key("head_dim", lambda raw: raw["hidden_size"] // raw["num_attention_heads"]),
    "mlp.ffn_hidden_size": Key("intermediate_size"),
    "mlp.activation": Key("hidden_act", "silu", {"gelu_tanh": "gelu_pytorch_tanh"}, {"gelu_new": "gelu_tanh"}),
    "norm.eps": Key("rms_norm_eps", 1e-6),
    "position.theta": Key("rope_theta", 10_000.0),
    "tied": Key("tie_word_embeddings", False),
    "init_std": Key("initializer_range", 0.02),
    "dropout.attention": Key("attention_dropout", 0.0),
}
AS_MANY_GROUPS_AS_HEADS = Key("num_key_value_heads", lambda raw: raw["num_attention_heads"])
ATTENTION_BIASES = {
    "attention.qkv_bias": Key("attention_bias", False),
    "attention.out_bias": Key("attention_bias", False),
}
NO_ATTENTION_BIASES = dict.fromkeys(ATTENTION_BIASES, False)
ALWAYS: dict[str, Any] = {
    "attention.kind": "gqa",
    "mlp.kind": "gated",
    "mlp.bias": False,
    "norm.kind": "rms",
    "position.kind": "rope",
    "position.scaling": rope.scaling,
}


def whole_heads(config: GPTConfig) -> Iterator[str]:
    """A limit: transformers wants heads to divide the width, even where `head_dim` is given."""
    if config.hidden_size % config.attention.heads:
        yield f"hidden_size = {config.hidden_size}, not a multiple of attention.heads = {config.attention.heads}"
