"""Phi-3: query, key and value are one tensor, and so are gate and up. Its LongRoPE is not implemented."""

from mt_ckpt.huggingface.families.decoder import (
    ALWAYS,
    AS_MANY_GROUPS_AS_HEADS,
    ATTENTION,
    KEYS,
    MLP,
    NO_ATTENTION_BIASES,
    NORMS,
    decoder_names,
)
from mt_ckpt.huggingface.families.family import Family, Key
from mt_ckpt.huggingface.families.windows import Window

PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    prefix="model.",
    names=decoder_names(NORMS | ATTENTION | MLP),
    keys=KEYS
    | {
        "attention.num_kv_heads": AS_MANY_GROUPS_AS_HEADS,
        "norm.eps": Key("rms_norm_eps", 1e-5),
        "dropout.hidden": Key("resid_pdrop", 0.0),
        "dropout.embedding": Key("embd_pdrop", 0.0),
    },
    always=ALWAYS | NO_ATTENTION_BIASES,
    also_written=lambda config: [("original_max_position_embeddings", config.max_seq_len)],
    window=Window(),
    fused={
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
    token_ids={"bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000},
)
