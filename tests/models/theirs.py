"""Models of transformers, their weights made visible, and their names in ours."""

from typing import Any

import torch

LLAMA_NAMES = {
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.out",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "model.embed_tokens": "embed",
    "model.norm": "norm",
    "model.layers": "layers",
    "lm_head": "head",
}


def renamed(name: str, names: dict[str, str]) -> str:
    for theirs, ours in names.items():
        name = name.replace(theirs, ours)
    return name


def randomised(model: Any) -> Any:
    """Larger weights than an initial model's, no bias zero and no norm one, so that nothing is invisible."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2).add_(1.0 if parameter.ndim == 1 else 0.0)
    return model.eval()


def tokens() -> torch.Tensor:
    return torch.randint(0, 99, (2, 50), generator=torch.Generator().manual_seed(1))
