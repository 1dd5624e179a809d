"""Qwen2 and Qwen2.5 (biases on query, key and value), and Qwen3 (norms of query and key heads, a head size of its own).

Their window counts only where `use_sliding_window` says so, and not in the first `max_window_layers` layers.
"""

from mt_ckpt.huggingface.families.decoder import (
    ALWAYS,
    ATTENTION,
    ATTENTION_BIASES,
    HEAD_NORMS,
    KEYS,
    MLP,
    NORMS,
    decoder_names,
)
from mt_ckpt.huggingface.families.family import Family, Key
from mt_ckpt.huggingface.families.windows import Window, from_layer

WINDOW = Window(default=4096, switched=True, slides=from_layer)

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    prefix="model.",
    names=decoder_names(NORMS | ATTENTION | MLP),
    keys=KEYS,
    always=ALWAYS | {"attention.qkv_bias": True, "attention.out_bias": False},
    window=WINDOW,
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    prefix="model.",
    names=decoder_names(NORMS | HEAD_NORMS | ATTENTION | MLP),
    keys=KEYS | ATTENTION_BIASES | {"attention.head_size": Key("head_dim", 128)},
    always=ALWAYS | {"attention.qk_norm": True},
    window=WINDOW,
)
