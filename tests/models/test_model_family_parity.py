"""Head norms, windows, soft caps, offset norms and experts give the logits of transformers' families that have them."""

import pytest
import torch

from models.parts import attention
from models.theirs import LLAMA_NAMES, randomised, renamed, tokens
from mt_models.canonical import load_stream
from mt_models.config import GPTConfig

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

CLOSE = {"rtol": 0, "atol": 1e-5}
SIZES = {"layers": 3, "hidden_size": 32, "vocab_size": 99, "max_seq_len": 64}
THEIR_SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "attn_implementation": "eager",
}
PARTS = {
    "mlp": {"kind": "gated", "ffn_hidden_size": 48},
    "norm": {"kind": "rms", "eps": 1e-3},
    "position": {"kind": "rope", "theta": 500.0},
}
HEAD_NORMS = {"self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm"}
SANDWICH = {
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
    "post_attention_layernorm": "attn_post_norm",
}


def to_canonical_names(theirs, names, *, tied=False):
    state = {renamed(name, names): tensor for name, tensor in theirs.state_dict().items()}
    for name in [name for name in state if name.endswith("experts.gate_up_proj")]:
        stem = name.removesuffix("gate_up_proj")
        state[f"{stem}gate.weight"], state[f"{stem}up.weight"] = state.pop(name).chunk(2, dim=1)
        state[f"{stem}down.weight"] = state.pop(f"{stem}down_proj")
    return {name: tensor for name, tensor in state.items() if not (tied and name == "head.weight")}


def compare(theirs, state, **parts):
    ours = GPTConfig.model_validate(SIZES | PARTS | parts).build()
    load_stream(ours, state.items())
    torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, **CLOSE)


@torch.no_grad()
def test_norms_of_query_and_key_heads_as_in_qwen3():
    theirs = randomised(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**THEIR_SIZES)))
    compare(
        theirs, to_canonical_names(theirs, HEAD_NORMS | LLAMA_NAMES), attention=attention(2, head_size=10, qk_norm=True)
    )


@pytest.mark.parametrize("core", ["eager", "sdpa"])
@torch.no_grad()
def test_a_sliding_window_as_in_mistral(core):
    config = transformers.MistralConfig(**THEIR_SIZES, sliding_window=7)
    theirs = randomised(transformers.MistralForCausalLM(config))
    compare(theirs, to_canonical_names(theirs, LLAMA_NAMES), attention=attention(2, head_size=10, window=7, core=core))


@torch.no_grad()
def test_a_window_in_some_layers_as_in_qwen2():
    config = transformers.Qwen2Config(**THEIR_SIZES, use_sliding_window=True, sliding_window=7, max_window_layers=1)
    theirs = randomised(transformers.Qwen2ForCausalLM(config))
    parts = attention(2, head_size=10, window=7, window_layers=[False, True, True], qkv_bias=True)
    compare(theirs, to_canonical_names(theirs, LLAMA_NAMES), attention=parts)


@pytest.mark.parametrize("cap", [0.5, 30.0])
@torch.no_grad()
def test_soft_caps_sandwich_norms_and_scaled_embeddings_as_in_gemma2(cap):
    config = transformers.Gemma2Config(
        **THEIR_SIZES,
        sliding_window=7,
        attn_logit_softcapping=cap,
        final_logit_softcapping=2 * cap,
        query_pre_attn_scalar=24,
        pad_token_id=None,
    )
    theirs = randomised(transformers.Gemma2ForCausalLM(config))
    compare(
        theirs,
        to_canonical_names(theirs, LLAMA_NAMES | SANDWICH, tied=True),
        attention=attention(
            2, head_size=10, window=7, window_layers=[True, False], softcap=cap, scale=24**-0.5, core="auto"
        ),
        mlp={"kind": "gated", "ffn_hidden_size": 48, "activation": "gelu_tanh"},
        norm={"kind": "rms", "eps": 1e-3, "offset": True},
        post_norms=True,
        scaled_embedding=True,
        logit_softcap=2 * cap,
        tied=True,
    )


@pytest.mark.parametrize("normalised", [True, False])
@torch.no_grad()
def test_a_mixture_of_experts_as_in_qwen3_moe(normalised):
    sizes = THEIR_SIZES | {"moe_intermediate_size": 48, "num_experts": 5, "num_experts_per_tok": 2}
    theirs = randomised(
        transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, norm_topk_prob=normalised))
    )
    compare(
        theirs,
        to_canonical_names(theirs, HEAD_NORMS | LLAMA_NAMES | {"mlp.gate.": "mlp.router."}),
        attention=attention(2, head_size=10, qk_norm=True),
        mlp={"kind": "moe", "ffn_hidden_size": 48, "experts": 5, "top_k": 2, "normalized": normalised},
    )


@torch.no_grad()
def test_a_mixture_of_experts_as_in_mixtral():
    sizes = THEIR_SIZES | {"num_local_experts": 5, "num_experts_per_tok": 2}
    theirs = randomised(transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)))
    compare(
        theirs,
        to_canonical_names(theirs, LLAMA_NAMES | {"mlp.gate.": "mlp.router."}),
        attention=attention(2, head_size=10),
        mlp={"kind": "moe", "ffn_hidden_size": 48, "experts": 5, "top_k": 2},
    )
