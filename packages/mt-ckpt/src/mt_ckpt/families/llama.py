"""Llama, and Mistral, which differs by a sliding window and lacks biases.

Both agree with us on layout (half-split rotary positions, [out, in] weights), so a tensor is only renamed.
"""

from collections.abc import Iterator

from mt_ckpt.families.family import Family, Key
from mt_ckpt.names import Names
from mt_models.config import GPTConfig

_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.out",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}

NAMES = Names(
    {
        "model.embed_tokens.weight": "embed.weight",
        **{
            f"model.layers.{{n}}.{theirs}.{part}": f"layers.{{n}}.{ours}.{part}"
            for theirs, ours in _BLOCK.items()
            for part in (("weight",) if "norm" in theirs else ("weight", "bias"))
        },
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "head.weight",
    },
    ignore=(r"\.rotary_emb\.inv_freq$",),  # a buffer in old exports; we compute it
)

KEYS = {
    "layers": Key("num_hidden_layers"),
    "model_size": Key("hidden_size"),
    "vocab_size": Key("vocab_size"),
    "max_positions": Key("max_position_embeddings"),
    "attention.heads": Key("num_attention_heads"),
    "attention.kv_groups": Key("num_key_value_heads", lambda raw: raw["num_attention_heads"]),
    "attention.head_size": Key("head_dim", lambda raw: raw["hidden_size"] // raw["num_attention_heads"]),
    "mlp.size": Key("intermediate_size"),
    "mlp.activation": Key("hidden_act", "silu", {"gelu_tanh": "gelu_pytorch_tanh"}, {"gelu_new": "gelu_tanh"}),
    "norm.eps": Key("rms_norm_eps", 1e-6),
    "position.theta": Key("rope_theta", 10_000.0),
    "tied": Key("tie_word_embeddings", False),
    "init_std": Key("initializer_range", 0.02),
}
BIASES = {
    "attention.qkv_bias": Key("attention_bias", False),
    "attention.out_bias": Key("attention_bias", False),
    "mlp.bias": Key("mlp_bias", False),
}
ALWAYS = {"attention.kind": "gqa", "mlp.kind": "gated", "norm.kind": "rms", "position.kind": "rope"}


def _whole_heads(config: GPTConfig) -> Iterator[str]:
    if config.model_size % config.attention.heads:
        yield f"model_size = {config.model_size}, not a multiple of attention.heads = {config.attention.heads}"


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    names=NAMES,
    keys=KEYS | BIASES,
    always=ALWAYS,
    limits=_whole_heads,
)
MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    prefix="model.",
    names=NAMES,
    keys=KEYS | {"attention.kv_groups": Key("num_key_value_heads")},
    always=ALWAYS | dict.fromkeys(BIASES, False),
    window=("sliding_window", 4096),
)
