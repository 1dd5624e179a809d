"""config.json of Hugging Face families, read and written."""

import json

import pytest
from transformers import AutoConfig

from mt_ckpt.families import FAMILIES
from mt_ckpt.hf_config import cannot_carry, read_config, write_config
from mt_ckpt.savers.hf import carrier
from mt_core.errors import MtError
from mt_models.config import GPTConfig

# as on the hub, written by transformers 4.31 to 4.37
LLAMA2 = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
MISTRAL = LLAMA2 | {
    "model_type": "mistral",
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 8,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
}
GPT2 = {
    "activation_function": "gelu_new",
    "attn_pdrop": 0.1,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}


def read(raw):
    return read_config(raw, FAMILIES, "config.json")


def refusal(raw):
    with pytest.raises(MtError) as error:
        read(raw)
    return [str(problem) for problem in error.value.problems]


def test_llama():
    config = read(LLAMA2).config
    assert (config.layers, config.model_size, config.vocab_size, config.max_positions) == (32, 4096, 32000, 4096)
    assert (config.attention.heads, config.attention.kv_groups, config.attention.head_size) == (32, 32, 128)
    assert (config.mlp.kind, config.mlp.size, config.mlp.activation) == ("gated", 11008, "silu")
    assert (config.norm.kind, config.norm.eps, config.position.theta, config.tied) == ("rms", 1e-5, 10_000.0, False)


def test_mistral():
    config = read(MISTRAL).config
    assert (config.attention.kv_groups, config.position.theta, config.max_positions) == (8, 1e6, 32768)


def test_gpt2():
    config = read(GPT2).config
    assert (config.mlp.size, config.mlp.activation, config.mlp.bias) == (3072, "gelu_tanh", True)
    assert (config.attention.kv_groups, config.attention.head_size, config.attention.qkv_bias) == (12, 64, True)
    assert (config.norm.kind, config.position.kind, config.tied) == ("layer", "learned", True)


def test_rope_theta_is_read_where_transformers_5_nests_it():
    raw = LLAMA2 | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    assert read(raw).config.position.theta == 500000.0


def test_a_missing_kv_head_count_means_multi_head_attention():
    assert read(LLAMA2 | {"num_key_value_heads": None}).config.attention.kv_groups == 32


def test_a_shorter_sliding_window_caps_the_positions_and_says_so():
    reading = read(MISTRAL | {"sliding_window": 4096})
    assert reading.config.max_positions == 4096
    assert reading.notes == (
        "sliding_window 4096 < 32768 positions: max_positions capped to 4096, where attention is full",
    )


def test_mistrals_window_is_4096_when_the_file_does_not_say():
    assert read({k: v for k, v in MISTRAL.items() if k != "sliding_window"}).config.max_positions == 4096


def test_a_window_that_never_binds_changes_nothing():
    reading = read(MISTRAL | {"sliding_window": 32768})
    assert (reading.config.max_positions, reading.notes) == (32768, ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling asks for rope_type 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling asks for rope_type 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_parameters asks for rope_type 'yarn'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters rotates a part of each head"),
        ({"quantization_config": {"quant_method": "gptq"}}, "its weights are quantised"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ({"num_key_value_heads": 5}, "kv_groups 5 does not divide heads 32"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a positive integer"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'; it must be a positive integer"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"model_type": "mamba"}, "model_type is 'mamba'; this loader reads llama, mistral, gpt2"),
    ],
)
def test_what_we_do_not_compute_is_refused(change, message):
    (problem,) = refusal(LLAMA2 | change)
    assert problem.startswith("config.json: ")
    assert message in problem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx is True; only False is implemented",
        ),
        ({"scale_attn_weights": False}, "scale_attn_weights is False; only True is implemented"),
        ({"add_cross_attention": True}, "add_cross_attention is True; only False is implemented"),
    ],
)
def test_gpt2s_switches_that_we_lack_are_refused(change, message):
    assert refusal(GPT2 | change) == [f"config.json: {message}"]


def test_everything_wrong_is_told_at_once():
    raw = {k: v for k, v in LLAMA2.items() if k not in ("vocab_size", "hidden_size")}
    problems = refusal(raw | {"rope_scaling": {"rope_type": "yarn"}, "quantization_config": {"bits": 4}})
    assert len(problems) == 4
    assert any("has no vocab_size" in problem for problem in problems)
    assert any("has no hidden_size" in problem for problem in problems)


def gpt(**changes):
    values = {
        "layers": 2,
        "model_size": 32,
        "vocab_size": 61,
        "max_positions": 40,
        "attention": {"heads": 4, "kv_groups": 2, "head_size": 8},
        "mlp": {"kind": "gated", "size": 48},
        "norm": {"kind": "rms"},
        "position": {"kind": "rope", "theta": 5000.0},
    }
    return GPTConfig.model_validate(values | changes)


GPT2_PARTS = {
    "attention": {"heads": 4, "kv_groups": 4, "head_size": 8, "qkv_bias": True, "out_bias": True},
    "mlp": {"kind": "dense", "size": 64, "bias": True},
    "norm": {"kind": "layer"},
    "position": {"kind": "learned"},
    "tied": True,
}


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (gpt(), "llama"),
        (gpt(tied=True, attention={"heads": 4, "kv_groups": 1, "head_size": 16}), "llama"),
        (gpt(attention={"heads": 4, "kv_groups": 2, "head_size": 8, "qkv_bias": True, "out_bias": True}), "llama"),
        (gpt(mlp={"kind": "gated", "size": 48, "bias": True, "activation": "gelu_tanh"}), "llama"),
        (gpt(attention={"heads": 3, "kv_groups": 1, "head_size": 16}), "mistral"),
        (gpt(**GPT2_PARTS), "gpt2"),
        (gpt(**GPT2_PARTS | {"tied": False}), "gpt2"),
        (
            gpt(**GPT2_PARTS | {"mlp": {"kind": "dense", "size": 50, "bias": True, "activation": "squared_relu"}}),
            "gpt2",
        ),
    ],
)
def test_the_family_that_carries_a_config_gives_it_back(config, family):
    assert carrier(config).model_type == family
    assert read(write_config(FAMILIES[family], config)).config == config


def test_what_no_family_can_carry_is_named_for_each():
    config = gpt(norm={"kind": "layer", "eps": 1e-6}, mlp={"kind": "dense", "size": 48, "activation": "relu"})
    with pytest.raises(MtError) as error:
        carrier(config)
    llama, _, gpt2 = map(str, error.value.problems)
    assert "llama: cannot carry mlp.kind = 'dense', norm.kind = 'layer'" in llama
    for value in (
        "attention.kv_groups = 2",
        "attention.qkv_bias = False",
        "mlp.bias = False",
        "position.kind = 'rope'",
    ):
        assert value in gpt2
    assert "or use --saver native" in gpt2


def test_biases_on_some_attention_projections_only_are_no_llama():
    config = gpt(attention={"heads": 4, "kv_groups": 2, "head_size": 8, "qkv_bias": True})
    assert cannot_carry(FAMILIES["llama"], config) == ["attention.qkv_bias = True"]


@pytest.mark.parametrize(("family", "config"), [("llama", gpt()), ("mistral", gpt()), ("gpt2", gpt(**GPT2_PARTS))])
def test_transformers_reads_what_we_write(family, config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(write_config(FAMILIES[family], config)))
    theirs = AutoConfig.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "again")
    assert read(json.loads((tmp_path / "again" / "config.json").read_text())).config == config


def test_releases_before_5_find_rope_theta_at_the_top():
    raw = write_config(FAMILIES["llama"], gpt())
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 5000.0
