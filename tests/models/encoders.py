"""Tiny configurations of BERT and T5."""

from typing import Any

from mt_models.config import BertConfig, T5Config

SIZES = {"layers": 2, "hidden_size": 32, "vocab_size": 99, "max_seq_len": 40}
BERT: dict[str, Any] = {
    "attention": {"heads": 4, "num_kv_heads": 4, "head_size": 8, "qkv_bias": True, "out_bias": True},
    "mlp": {"kind": "dense", "ffn_hidden_size": 48, "activation": "gelu", "bias": True},
    "norm": {"kind": "layer", "eps": 1e-3},
}
T5: dict[str, Any] = {
    "decoder_layers": 3,
    "attention": {"heads": 4, "num_kv_heads": 4, "head_size": 6, "scale": 1.0},
    "mlp": {"kind": "gated", "ffn_hidden_size": 48, "activation": "gelu_tanh"},
    "norm": {"kind": "rms", "eps": 1e-3},
    "position": {"kind": "relative", "buckets": 8, "max_distance": 20},
}


def bert(**changes: Any) -> BertConfig:
    """Megatron's order of norms and all heads; keyword arguments replace fields."""
    return BertConfig.model_validate(SIZES | BERT | changes)


def t5(**changes: Any) -> T5Config:
    """T5 v1.1's parts; keyword arguments replace fields."""
    return T5Config.model_validate(SIZES | T5 | changes)
