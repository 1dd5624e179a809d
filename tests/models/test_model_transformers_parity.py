"""Logits equal those of transformers for the same weights, on tiny random models in fp32."""

import pytest
import torch

from models.parts import attention
from models.theirs import LLAMA_NAMES, randomised, renamed, tokens
from mt_models.canonical import load_stream
from mt_models.config import GPTConfig

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

CLOSE = {"rtol": 0, "atol": 1e-5}
SIZES = {"layers": 3, "hidden_size": 32, "vocab_size": 99, "max_seq_len": 64}

GPT2_NAMES = {
    "attn.c_proj": "attn.out",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
    "ln_1": "attn_norm",
    "ln_2": "mlp_norm",
    "transformer.wte": "embed",
    "transformer.wpe": "position",
    "transformer.ln_f": "norm",
    "transformer.h": "layers",
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@torch.no_grad()
def test_llama(num_kv_heads, tied):
    theirs = randomised(
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=99,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=num_kv_heads,
                head_dim=10,
                max_position_embeddings=64,
                rms_norm_eps=1e-3,
                rope_parameters={"rope_type": "default", "rope_theta": 500.0},
                tie_word_embeddings=tied,
            )
        )
    )
    parts = {
        "attention": attention(num_kv_heads, head_size=10),
        "mlp": {"kind": "gated", "ffn_hidden_size": 48},
        "norm": {"kind": "rms", "eps": 1e-3},
        "position": {"kind": "rope", "theta": 500.0},
    }
    ours = GPTConfig.model_validate(SIZES | parts | {"tied": tied}).build()
    state = {renamed(name, LLAMA_NAMES): tensor for name, tensor in theirs.state_dict().items()}
    if tied:
        del state["head.weight"]
    load_stream(ours, state.items())
    torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, **CLOSE)


def gpt2_tensors(model):
    """Canonical tensors of transformers' GPT-2, which keeps (in, out) weights and one matrix for q, k and v."""
    for name, tensor in model.state_dict().items():
        name = renamed(name, GPT2_NAMES)
        if name.startswith("layers") and tensor.ndim == 2:
            tensor = tensor.T
        if "c_attn" in name:
            yield from ((name.replace("c_attn", p), part) for p, part in zip("qkv", tensor.chunk(3), strict=True))
        elif name != "lm_head.weight":
            yield name, tensor


@torch.no_grad()
def test_gpt2():
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "n_positions": 64, "vocab_size": 99}
    theirs = randomised(
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**sizes, activation_function="gelu_new", layer_norm_epsilon=1e-3)
        )
    )
    parts = {
        "attention": attention(4, head_size=8, qkv_bias=True, out_bias=True),
        "mlp": {"kind": "dense", "ffn_hidden_size": 48, "activation": "gelu_tanh", "bias": True},
        "norm": {"kind": "layer", "eps": 1e-3},
        "position": {"kind": "learned"},
    }
    ours = GPTConfig.model_validate(SIZES | parts | {"tied": True}).build()
    load_stream(ours, gpt2_tensors(theirs))
    torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, **CLOSE)
