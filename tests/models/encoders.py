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


HEADLESS = {"lm_head": False, "pooler": False, "binary_head": False}
GROUPS = {"heads": 4, "num_kv_heads": 2, "head_size": 6, "qk_norm": True, "qkv_bias": True}
MODELS = {
    "bert": bert(),
    "bert, norms after": bert(norm_place="after", attention=GROUPS, token_types=0),
    "bert without heads": bert(**HEADLESS),
    "bert, another activation in the head": bert(head_activation="gelu_tanh"),
    "t5": t5(),
    "t5, groups": t5(attention=GROUPS),
    "t5, tied": t5(tied=True, scaled_head=True, mlp=BERT["mlp"]),
    "t5 of Megatron": t5(**BERT, position={"kind": "learned"}, tied=True, head_bias=True),
    "t5, biased head": t5(head_bias=True),
    "t5 without final norms": t5(final_norm=False),
}
