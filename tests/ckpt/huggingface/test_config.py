"""config.json of Hugging Face families, read and written."""

import json
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest
from transformers import AutoConfig, BertConfig, T5Config

import mt_models
from mt_ckpt.huggingface.config import find_lost_settings, read_config, write_config
from mt_ckpt.huggingface.families import FAMILIES
from mt_ckpt.huggingface.saver import choose_family
from mt_core.errors import MtError
from mt_models.config import Dropout, GPTConfig

YARN = {"rope_type": "yarn", "factor": 4.0}

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


LLAMA31 = LLAMA2 | {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
MIXTRAL = MISTRAL | {"model_type": "mixtral", "num_experts_per_tok": 2, "num_local_experts": 8}
QWEN2 = LLAMA2 | {"model_type": "qwen2", "max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False}
QWEN3 = LLAMA2 | {
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_MOE = QWEN3 | {
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
GEMMA = {
    "model_type": "gemma",
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "vocab_size": 256000,
}
GEMMA2 = GEMMA | {
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
PHI3 = LLAMA2 | {"model_type": "phi3", "sliding_window": 2047, "original_max_position_embeddings": 4096}


def read(raw):
    return read_config(raw, FAMILIES, "config.json")


def preset(name):
    path = Path(mt_models.__file__).parent / "presets" / f"{name}.toml"
    return GPTConfig.model_validate(tomllib.loads(path.read_text())["model"])


def refusal(raw):
    with pytest.raises(MtError) as error:
        read(raw)
    return [str(problem) for problem in error.value.problems]


def test_llama():
    config = read(LLAMA2)
    assert (config.layers, config.hidden_size, config.vocab_size, config.max_seq_len) == (32, 4096, 32000, 4096)
    assert (config.attention.heads, config.attention.num_kv_heads, config.attention.head_size) == (32, 32, 128)
    assert (config.mlp.kind, config.mlp.ffn_hidden_size, config.mlp.activation) == ("gated", 11008, "silu")
    assert (config.norm.kind, config.norm.eps, config.position.theta, config.tied) == ("rms", 1e-5, 10_000.0, False)


def test_mistral():
    config = read(MISTRAL)
    assert (config.attention.num_kv_heads, config.position.theta, config.max_seq_len) == (8, 1e6, 32768)


def test_gpt2():
    config = read(GPT2)
    assert (config.mlp.ffn_hidden_size, config.mlp.activation, config.mlp.bias) == (3072, "gelu_tanh", True)
    assert (config.attention.num_kv_heads, config.attention.head_size, config.attention.qkv_bias) == (12, 64, True)
    assert (config.norm.kind, config.position.kind, config.tied) == ("layer", "learned", True)


def test_llama_31_scales_its_frequencies():
    scaling = read(LLAMA31).position.scaling
    assert scaling.model_dump() == {
        "kind": "llama3",
        "factor": 8.0,
        "original_positions": 8192,
        "low_frequency": 1.0,
        "high_frequency": 4.0,
    }


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("llama2-7b", LLAMA2),
        ("mistral-7b", MISTRAL | {"rope_theta": 10000.0, "sliding_window": 4096}),
        ("mixtral-8x7b", MIXTRAL),
        ("qwen3-8b", QWEN3),
        ("gemma-2-2b", GEMMA2),
    ],
)
def test_a_preset_is_the_model_on_the_hub(name, raw):
    ours = preset(name)
    if ours.mlp.kind == "moe":  # how it is trained is not in the file
        ours = ours.model_copy(update={"mlp": ours.mlp.model_copy(update={"aux_loss_coeff": 0.0})})
    assert read(raw) == ours


def test_yarn_stretches_the_positions_of_the_file_unless_it_names_others():
    qwen = QWEN2 | {"max_position_embeddings": 32768}
    assert read(qwen | {"rope_scaling": YARN}).position.scaling.original_positions == 32768
    given = qwen | {"original_max_position_embeddings": 1000}
    assert read(given | {"rope_scaling": YARN}).position.scaling.original_positions == 1000
    nested = {"rope_scaling": YARN | {"original_max_position_embeddings": 500}}
    assert read(given | nested).position.scaling.original_positions == 500


def test_qwen3_moe():
    config = read(QWEN3_MOE)
    assert (config.mlp.experts, config.mlp.top_k, config.mlp.ffn_hidden_size, config.mlp.normalized) == (
        128,
        8,
        768,
        True,
    )
    assert (config.attention.qk_norm, config.attention.head_size, config.attention.qkv_bias) == (True, 128, False)


def test_gemmas_gelu_is_its_approximation():
    assert read(GEMMA).mlp.activation == "gelu_tanh"


@pytest.mark.parametrize(("divisor", "scale"), [(256, None), (144, 1 / 12)])
def test_gemma_2_divides_scores_by_the_root_of_a_number_of_its_own(divisor, scale):
    assert read(GEMMA2 | {"query_pre_attn_scalar": divisor}).attention.scale == scale


def test_gemma_2_without_caps():
    config = read(GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert (config.attention.softcap, config.logit_softcap) == (None, None)


def windows(raw):
    part = read(raw).attention
    return part.window, part.window_layers


def test_mistrals_window_is_4096_when_the_file_does_not_say():
    assert windows({k: v for k, v in MISTRAL.items() if k != "sliding_window"}) == (4096, None)


def test_no_window_where_the_file_says_null():
    assert windows(MISTRAL) == windows(PHI3 | {"sliding_window": None}) == (None, None)


def test_a_window_that_never_binds_is_none():
    assert windows(MISTRAL | {"sliding_window": 32768}) == (None, None)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, (None, None)),
        ({"use_sliding_window": True, "sliding_window": 9}, (9, (False,) * 28 + (True,) * 4)),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}, (9, None)),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 32}, (None, None)),
        (
            {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["sliding_attention"] * 32},
            (9, None),
        ),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["full_attention", "sliding_attention"] * 16,
            },
            (9, (False, True)),
        ),
    ],
)
def test_qwens_window_counts_in_some_layers_and_only_if_it_is_used(change, expected):
    assert windows(QWEN2 | change) == expected


def test_rope_theta_is_read_where_transformers_5_nests_it():
    raw = LLAMA2 | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    assert read(raw).position.theta == 500000.0


def test_a_missing_kv_head_count_means_multi_head_attention():
    assert read(LLAMA2 | {"num_key_value_heads": None}).attention.num_kv_heads == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling asks for rope_type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters asks for rope_type 'longrope'; allowed: "),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters rotates a part of each head"),
        ({"partial_rotary_factor": 0.75}, "partial_rotary_factor is 0.75; only 1 is implemented"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; it must be an object"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling has no factor; linear needs it"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2x"}}, "factor is '2x'"),
        (
            {"rope_scaling": YARN | {"mscale_low": 0.7}},
            "rope_scaling has mscale_low 0.7; of yarn, attention_factor, beta_fast",
        ),
        ({"rope_scaling": YARN | {"truncate": False}}, "rope_scaling has truncate False"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters differs by type of layer"),
        (
            {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling and rope_parameters disagree: default, yarn; give one of them",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "its weights are quantised"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ({"num_key_value_heads": 5}, "num_kv_heads 5 does not divide heads 32"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a positive integer"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'; it must be a positive integer"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"model_type": "mamba"}, "model_type is 'mamba'; this loader reads llama, mistral, gpt2, "),
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


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (QWEN3_MOE | {"decoder_sparse_step": 2}, "decoder_sparse_step is 2; only 1 is implemented"),
        (QWEN3_MOE | {"mlp_only_layers": [0]}, "mlp_only_layers is [0]; only [] is implemented"),
        (GEMMA | {"hidden_act": "silu"}, "hidden_act is 'silu'; of Gemma, only 'gelu_pytorch_tanh' is implemented"),
        (GEMMA | {"hidden_activation": "relu"}, "hidden_activation is 'relu'; of Gemma, only 'gelu_pytorch_tanh' is"),
        (GEMMA2 | {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0; it must be a positive number"),
        (QWEN2 | {"layer_types": 7}, "layer_types is 7; it must be a list of names"),
        (GEMMA2 | {"use_bidirectional_attention": True}, "use_bidirectional_attention is True; only False is"),
        (GEMMA2 | {"layer_types": ["full_attention"] * 25}, "layer_types names 25 layers; num_hidden_layers is 26"),
        (
            QWEN2 | {"layer_types": ["linear_attention"] * 32},
            "layer_types has 'linear_attention'; only 'sliding_attention' and 'full_attention' are implemented",
        ),
        (
            MISTRAL | {"layer_types": ["full_attention", "sliding_attention"] * 16},
            "layer_types has full_attention and sliding_attention; all layers of this family are alike",
        ),
        (QWEN2 | {"max_window_layers": "x"}, "max_window_layers is 'x'; it must be a number of tokens or layers"),
        (PHI3 | {"rope_scaling": {"type": "longrope"}}, "rope_scaling asks for rope_type 'longrope'"),
        (PHI3 | {"partial_rotary_factor": 0.75}, "partial_rotary_factor is 0.75; only 1 is implemented"),
        (MIXTRAL | {"num_local_experts": None}, "has no num_local_experts; it must be a positive integer"),
        (MIXTRAL | {"num_experts_per_tok": 9}, "top_k 9 is more than experts 8"),
    ],
)
def test_what_a_family_asks_for_that_we_lack_is_refused(raw, message):
    (problem,) = refusal(raw)
    assert message in problem


WHOLE = {
    **{raw["model_type"]: raw for raw in (LLAMA31, MISTRAL, MIXTRAL, QWEN2, QWEN3_MOE, GEMMA, GEMMA2, PHI3, GPT2)},
    "bert": BertConfig().to_dict(),
    "t5": T5Config(feed_forward_proj="gated-gelu").to_dict(),
}


@pytest.mark.parametrize("raw", WHOLE.values(), ids=list(WHOLE))
def test_whatever_a_key_holds_the_file_is_read_or_refused(raw):
    for name in raw:
        for value in (None, "x", -1, 0, [], ["a"], {"a": 1}, 2.5, True):
            with suppress(MtError):
                read(raw | {name: value})


@pytest.mark.parametrize("name", LLAMA31["rope_scaling"])
def test_whatever_the_scaling_holds_the_file_is_read_or_refused(name):
    for value in (None, "x", -1, 0, [], {"a": 1}, 2.5, True):
        with suppress(MtError):
            read(LLAMA31 | {"rope_scaling": LLAMA31["rope_scaling"] | {name: value}})


def test_null_is_as_good_as_an_empty_switch():
    assert read(QWEN3_MOE | {"mlp_only_layers": None}).mlp.kind == "moe"


def test_an_unknown_scaling_and_an_unknown_activation_are_told_at_once():
    problems = refusal(LLAMA2 | {"rope_scaling": {"type": "dynamic"}, "hidden_act": "mish"})
    assert len(problems) == 2


def test_everything_wrong_is_told_at_once():
    raw = {k: v for k, v in LLAMA2.items() if k not in ("vocab_size", "hidden_size")}
    problems = refusal(raw | {"rope_scaling": {"rope_type": "yarn"}, "quantization_config": {"bits": 4}})
    assert len(problems) == 4
    assert any("has no vocab_size" in problem for problem in problems)
    assert any("has no hidden_size" in problem for problem in problems)


def gpt(**changes):
    values = {
        "layers": 2,
        "hidden_size": 32,
        "vocab_size": 61,
        "max_seq_len": 40,
        "attention": {"heads": 4, "num_kv_heads": 2, "head_size": 8},
        "mlp": {"kind": "gated", "ffn_hidden_size": 48},
        "norm": {"kind": "rms"},
        "position": {"kind": "rope", "theta": 5000.0},
    }
    return GPTConfig.model_validate(values | changes)


GPT2_PARTS = {
    "attention": {"heads": 4, "num_kv_heads": 4, "head_size": 8, "qkv_bias": True, "out_bias": True},
    "mlp": {"kind": "dense", "ffn_hidden_size": 64, "bias": True},
    "norm": {"kind": "layer"},
    "position": {"kind": "learned"},
    "tied": True,
}


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (gpt(), "llama"),
        (gpt(tied=True, attention={"heads": 4, "num_kv_heads": 1, "head_size": 16}), "llama"),
        (gpt(attention={"heads": 4, "num_kv_heads": 2, "head_size": 8, "qkv_bias": True, "out_bias": True}), "llama"),
        (gpt(mlp={"kind": "gated", "ffn_hidden_size": 48, "bias": True, "activation": "gelu_tanh"}), "llama"),
        (gpt(attention={"heads": 3, "num_kv_heads": 1, "head_size": 16}), "mistral"),
        (gpt(**GPT2_PARTS), "gpt2"),
        (gpt(**GPT2_PARTS | {"tied": False}), "gpt2"),
        (
            gpt(
                **GPT2_PARTS
                | {"mlp": {"kind": "dense", "ffn_hidden_size": 50, "bias": True, "activation": "squared_relu"}}
            ),
            "gpt2",
        ),
    ],
)
def test_the_family_that_carries_a_config_gives_it_back(config, family):
    assert choose_family(config).model_type == family
    assert read(write_config(FAMILIES[family], config)) == config


def test_what_stands_in_the_way_of_the_closest_families_is_named():
    config = gpt(
        norm={"kind": "layer", "eps": 1e-6}, mlp={"kind": "dense", "ffn_hidden_size": 48, "activation": "relu"}
    )
    with pytest.raises(MtError) as error:
        choose_family(config)
    problems = [str(problem) for problem in error.value.problems]
    assert len(problems) == 3
    assert problems[0] == (
        "saver hf: llama: cannot carry mlp.kind = 'dense', norm.kind = 'layer'; or use --saver native"
    )


def test_what_stands_in_the_way_of_the_family_asked_for_is_named():
    (lost,) = cannot(gpt(), "gpt2")
    for value in (
        "attention.num_kv_heads = 2",
        "attention.qkv_bias = False",
        "mlp.bias = False",
        "position.kind = 'rope'",
    ):
        assert value in lost


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_heads_that_do_not_divide_the_width_are_no_limit_of_ours_but_of_transformers(family):
    (lost,) = cannot(gpt(attention={"heads": 3, "num_kv_heads": 1, "head_size": 16}), family)
    assert "hidden_size = 32, not a multiple of attention.heads = 3" in lost


def test_an_unknown_family_is_refused():
    (problem,) = cannot(gpt(), "lama")
    assert problem.startswith("--target-model-type: unknown family 'lama'; did you mean 'llama'?")


def cannot(config, family):
    with pytest.raises(MtError) as error:
        choose_family(config, family)
    return [str(problem) for problem in error.value.problems]


@pytest.mark.parametrize("scale", [2.0, 0.3])
def test_a_scale_that_is_no_root_of_a_whole_number_is_told(scale):
    config = gpt(attention={"heads": 4, "num_kv_heads": 2, "head_size": 8, "scale": scale})
    assert f"attention.scale = {scale}" in find_lost_settings(FAMILIES["gemma2"], config)


def test_the_same_said_in_another_way_is_carried():
    part = {"heads": 4, "num_kv_heads": 2, "head_size": 8, "scale": 8**-0.5, "window": 6, "window_layers": [True, True]}
    assert choose_family(gpt(attention=part)).model_type == "mistral"


def test_biases_on_some_attention_projections_only_are_no_llama():
    config = gpt(attention={"heads": 4, "num_kv_heads": 2, "head_size": 8, "qkv_bias": True})
    assert find_lost_settings(FAMILIES["llama"], config) == ["attention.qkv_bias = True"]


@pytest.mark.parametrize(("family", "config"), [("llama", gpt()), ("mistral", gpt()), ("gpt2", gpt(**GPT2_PARTS))])
def test_transformers_reads_what_we_write(family, config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(write_config(FAMILIES[family], config)))
    theirs = AutoConfig.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "again")
    assert read(json.loads((tmp_path / "again" / "config.json").read_text())) == config


def test_releases_before_5_find_rope_theta_at_the_top():
    raw = write_config(FAMILIES["llama"], gpt())
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 5000.0


DROPOUT = {
    "llama": ({"attention_dropout": 0.2}, {"attention": 0.2}),
    "phi3": (
        {"attention_dropout": 0.2, "resid_pdrop": 0.3, "embd_pdrop": 0.4},
        {"attention": 0.2, "hidden": 0.3, "embedding": 0.4},
    ),
    "gpt2": (
        {"attn_pdrop": 0.2, "resid_pdrop": 0.3, "embd_pdrop": 0.4},
        {"attention": 0.2, "hidden": 0.3, "embedding": 0.4},
    ),
    "bert": (
        {"attention_probs_dropout_prob": 0.2, "hidden_dropout_prob": 0.3},
        {"attention": 0.2, "hidden": 0.3, "embedding": 0.3},
    ),
    "megatron-bert": (
        {"attention_probs_dropout_prob": 0.2, "hidden_dropout_prob": 0.3},
        {"attention": 0.2, "hidden": 0.3, "embedding": 0.3},
    ),
    "t5": ({"dropout_rate": 0.2}, {"attention": 0.2, "hidden": 0.2, "embedding": 0.2}),
}
"""Keys of config.json, and our rates for them."""


@pytest.mark.parametrize("family", DROPOUT)
def test_rates_of_dropout_are_carried_both_ways_and_default_as_transformers_does(family):
    keys, rates = DROPOUT[family]
    more = {"feed_forward_proj": "gated-gelu"} if family == "t5" else {}
    default = AutoConfig.for_model(family, **more)
    raw = default.to_dict()
    ours = read_config(raw | keys, FAMILIES, "here")
    assert {name: rate for name, rate in ours.dropout if rate} == rates
    assert {name: write_config(FAMILIES[family], ours)[name] for name in keys} == keys
    silent = read_config({name: value for name, value in raw.items() if name not in keys}, FAMILIES, "here")
    assert silent.dropout == read_config(raw, FAMILIES, "here").dropout


def test_a_rate_that_a_family_has_no_key_for_does_not_keep_a_model_from_being_one():
    config = read_config(LLAMA2, FAMILIES, "here")
    config = config.model_copy(update={"dropout": Dropout(attention=0.1, hidden=0.2)})
    assert find_lost_settings(FAMILIES["llama"], config) == []
    assert write_config(FAMILIES["llama"], config)["attention_dropout"] == 0.1
