"""Tiny models of the kinds that generation has to do with, in fp32, peaked enough that greedy texts vary."""

from functools import cache
from typing import Any

import torch

from eval.conftest import CONFIG
from mt_models.config import GPTConfig
from mt_models.models.gpt import GPT

DENSE = {"kind": "dense", "ffn_hidden_size": 50, "activation": "gelu_tanh", "bias": True}
GQA = CONFIG["attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {
        **{"mlp": DENSE, "norm": {"kind": "layer"}, "position": {"kind": "learned"}, "tied": True},
        "attention": {"heads": 4, "num_kv_heads": 4, "head_size": 8, "qkv_bias": True, "out_bias": True},
    },
    "llama": {},
    "mistral": {"attention": GQA | {"window": 7}},
    "gemma2": {
        "attention": GQA | {"window": 6, "window_layers": (True, False), "softcap": 50.0},
        **{"post_norms": True, "scaled_embedding": True, "logit_softcap": 30.0},
    },
    "mla": {
        "attention": {
            **{"kind": "mla", "heads": 4, "kv_lora_rank": 16},
            **{"nope_head_size": 6, "rope_head_size": 4, "v_head_size": 5},
        }
    },
    "moe": {"mlp": {"kind": "moe", "ffn_hidden_size": 24, "experts": 4, "top_k": 2}},
}


@cache
def make_family(name: str, dtype: torch.dtype = torch.float32, window: int | None = None) -> GPT:
    """Build the model, with weights of 0.2 and a vocabulary of 97; `window` is instead of the family's."""
    fields = CONFIG | {"vocab_size": 97, "init_std": 0.2} | FAMILIES[name]
    if window is not None:
        fields["attention"] = fields["attention"] | {"window": window}
    config = GPTConfig.model_validate(fields)
    model = config.build()
    model.initialize(3)
    return model.to(dtype).eval().requires_grad_(False)
