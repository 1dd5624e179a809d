"""Every decoder family of Hugging Face: transformers' model through our loader, and ours through our saver."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from ckpt.conftest import bits, hugging_face_model
from mt_ckpt.conversion.convert import convert
from mt_ckpt.conversion.verify import our_logits, transformers_logits
from mt_ckpt.huggingface.config import read_config
from mt_ckpt.huggingface.families import FAMILIES
from mt_ckpt.huggingface.saver import choose_family, save
from mt_cli.run_config import load_run_config
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.errors import MtError
from mt_models.canonical import canonical_state
from mt_models.config import GPTConfig

WEIGHTS = "model.safetensors"
TOKENS_BT = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(1))
CLOSE = 5e-6
"""Allowed difference as a part of the largest logit; fp32 sums in another order."""


def rope(kind, **settings):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 50.0, **settings}}


CASES = {
    "yi": ("llama", {"num_key_value_heads": 1, "rms_norm_eps": 1e-5} | rope("default")),
    "smollm": ("llama", {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama linear": ("llama", rope("linear", factor=4.0)),
    "llama 3": (
        "llama",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "llama yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=10)),
    "llama yarn, all set": ("llama", rope("yarn", factor=4.0, beta_fast=8.0, beta_slow=2.0, attention_factor=1.3)),
    "llama yarn, mscales": ("llama", rope("yarn", factor=4.0, mscale=0.7, mscale_all_dim=0.9)),
    "llama yarn, one mscale": ("llama", rope("yarn", factor=4.0, mscale=0.7)),
    "mistral": ("mistral", {"sliding_window": 7}),
    "mistral 0.3": ("mistral", {"sliding_window": None}),
    "mixtral": ("mixtral", {}),
    "mixtral window": ("mixtral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 yarn, window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1} | rope("yarn", factor=2.0),
    ),
    "qwen3": ("qwen3", {}),
    "qwen3 window, biases": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2, "attention_bias": True},
    ),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe unnormalised": ("qwen3_moe", {"norm_topk_prob": False, "use_sliding_window": True, "sliding_window": 7}),
    "deepseek_v2": ("deepseek_v2", {"rms_norm_eps": 1e-4, "topk_method": "greedy"}),
    "deepseek_v2 yarn, groups, compressed queries": (
        "deepseek_v2",
        {
            **{"q_lora_rank": 14, "routed_scaling_factor": 1.7, "first_k_dense_replace": 2},
            **{"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
            **rope("yarn", factor=4.0, original_max_position_embeddings=10, mscale=0.7, mscale_all_dim=0.9),
        },
    ),
    "deepseek_v2 without dense layers": ("deepseek_v2", {"first_k_dense_replace": 0, "topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v3 yarn, unnormalised, compressed queries": (
        "deepseek_v3",
        {"q_lora_rank": 14, "norm_topk_prob": False, "n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-4}
        | rope("yarn", factor=4.0, original_max_position_embeddings=10, mscale=0.7, mscale_all_dim=0.9),
    ),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0}),
    "gemma2 plain": (
        "gemma2",
        {
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "layer_types": ["full_attention"] * 3,
        },
    ),
    "phi3": ("phi3", {"sliding_window": 7}),
}


def differ(left_BTV, right_BTV):
    return ((left_BTV - right_BTV).abs().max() / right_BTV.abs().max()).item()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "changes"), CASES.values(), ids=list(CASES))
def test_bits_and_logits_survive(family, changes, save_model, tmp_path):
    source = save_model(family, **changes)
    convert("hf", source, "native", tmp_path / "native")
    convert("native", tmp_path / "native", "hf", tmp_path / "hf", options={"target_model_type": family})
    assert bits(tmp_path / "hf") == bits(source)
    expected_BTV = transformers_logits(source, TOKENS_BT)
    assert torch.equal(transformers_logits(tmp_path / "hf", TOKENS_BT), expected_BTV)
    assert differ(our_logits(open_checkpoint(tmp_path / "native"), TOKENS_BT), expected_BTV) <= CLOSE
    assert open_checkpoint(tmp_path / "hf").config() == open_checkpoint(source).config()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "changes"), CASES.values(), ids=list(CASES))
def test_transformers_reads_and_writes_our_config_json(family, changes, save_model, tmp_path):
    source = save_model(family, **changes)
    config = open_checkpoint(source).config()
    save(tmp_path / "ours", config, open_checkpoint(source).tensors(), target_model_type=family)
    theirs = AutoConfig.from_pretrained(tmp_path / "ours")
    assert theirs.model_type == family
    theirs.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert read_config(again, FAMILIES, "config.json") == config


GROUPED = {"heads": 4, "num_kv_heads": 2, "head_size": 8}


def ours(**changes):
    attention = changes.pop("attention", {})
    values = {
        "layers": 3,
        "hidden_size": 32,
        "vocab_size": 61,
        "max_seq_len": 40,
        "init_std": 0.2,
        "attention": attention if attention.get("kind") == "mla" else GROUPED | attention,
        "mlp": {"kind": "gated", "ffn_hidden_size": 48},
        "norm": {"kind": "rms"},
        "position": {"kind": "rope", "theta": 5000.0},
    }
    return GPTConfig.model_validate(values | changes)


MOE = {"kind": "moe", "ffn_hidden_size": 24, "experts": 4, "top_k": 2, "aux_loss_coeff": 0.01}
DEEPSEEK = {
    "attention": {
        **{"kind": "mla", "heads": 4, "q_lora_rank": 9, "kv_lora_rank": 12},
        **{"nope_head_size": 6, "rope_head_size": 4, "v_head_size": 5},
    },
    "mlp": MOE
    | {"normalized": False, "shared_ffn_hidden_size": 48, "dense_layers": 1, "dense_ffn_hidden_size": 40, "groups": 2}
    | {"top_groups": 1, "group_best": 1, "scaling_factor": 1.5},
    "norm": {"kind": "rms", "eps": 1e-6},
    "position": {
        "kind": "rope",
        "scaling": {
            **{"kind": "yarn", "factor": 3.0, "original_positions": 16, "mscale": 0.7, "mscale_all_dim": 0.9},
        },
    },
}
V3_ROUTER = {"normalized": True, "score": "sigmoid", "expert_bias": True, "group_best": 2, "scaling_factor": 2.5}
DEEPSEEK_V2_LITE = """{"model_type": "deepseek_v2", "attention_bias": false, "attention_dropout": 0.0,
  "aux_loss_alpha": 0.001, "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1,
  "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944,
  "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 1408, "moe_layer_freq": 1,
  "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": false, "num_attention_heads": 16,
  "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "pretraining_tp": 1,
  "q_lora_rank": null, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
  "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096, "type": "yarn"},
  "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": true,
  "tie_word_embeddings": false, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16",
  "use_cache": true, "v_head_dim": 128, "vocab_size": 102400}"""
OF_GEMMA = {
    "norm": {"kind": "rms", "offset": True},
    "scaled_embedding": True,
    "mlp": {"kind": "gated", "ffn_hidden_size": 48, "activation": "gelu_tanh"},
    "tied": True,
}
MODELS = {
    "llama": ours(position={"kind": "rope", "scaling": {"kind": "linear", "factor": 2.0}}),
    "mistral": ours(attention={"window": 6}),
    "qwen2": ours(attention={"qkv_bias": True, "window": 6, "window_layers": [False, True, False]}),
    "qwen3": ours(attention={"qk_norm": True, "window": 6, "window_layers": [False, False, True]}),
    "mixtral": ours(mlp=MOE),
    "qwen3_moe": ours(mlp=MOE | {"normalized": False}, attention={"qk_norm": True}),
    "deepseek_v2": ours(**DEEPSEEK),
    "deepseek_v3": ours(**DEEPSEEK | {"mlp": DEEPSEEK["mlp"] | V3_ROUTER}),
    "gemma": ours(**OF_GEMMA),
    "gemma2": ours(
        **OF_GEMMA,
        attention={"softcap": 3.0, "scale": 1 / 12, "window": 6, "window_layers": [True, False]},
        post_norms=True,
        logit_softcap=5.0,
    ),
}


@pytest.mark.parametrize(("family", "config"), MODELS.items(), ids=list(MODELS))
@torch.no_grad()
def test_transformers_computes_with_our_model(family, config, tmp_path):
    model = config.build()
    model.initialize(3)
    save(tmp_path / "ours", config, canonical_state(model).items())
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == family
    assert differ(transformers_logits(tmp_path / "ours", TOKENS_BT), model(TOKENS_BT)) <= CLOSE


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"])
def test_experts_packed_by_transformers_5_are_read(family, save_model, tmp_path):
    source = save_model(family)
    hugging_face_model(family).save_pretrained(tmp_path / "packed", save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in bits(tmp_path / "packed"))
    convert("hf", tmp_path / "packed", "hf", tmp_path / "apart")
    assert bits(tmp_path / "apart") == bits(source)


def edit(path, change):
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS, {"format": "pt"})


def problems(*args, **kwargs):
    with pytest.raises(MtError) as error:
        convert(*args, **kwargs)
    return [str(problem) for problem in error.value.problems]


def test_each_expert_is_accounted_for(save_model, tmp_path):
    path = save_model("mixtral")
    experts = "model.layers.1.block_sparse_moe.experts"

    def damage(tensors):
        del tensors[f"{experts}.3.w1.weight"]
        tensors[f"{experts}.5.w2.weight"] = tensors[f"{experts}.4.w2.weight"].clone()
        tensors[f"{experts}.0.w3.weight"] = torch.zeros(47, 32)

    edit(path, damage)
    reported = problems("mixtral_hf", path, "native", tmp_path / "result")
    assert [problem.removeprefix(f"{path}: layers.1.mlp.experts.") for problem in reported] == [
        "3.gate.weight: tensor is missing; shape (48, 32)",
        "0.up.weight: tensor has shape (47, 32); the model needs (48, 32)",
        "5.down.weight: unexpected tensor of shape (32, 48); the model has no tensor of this name",
    ]


def test_experts_of_several_dtypes_are_refused(save_model, tmp_path):
    path = save_model("qwen3_moe")
    name = "model.layers.2.mlp.experts.1.up_proj.weight"
    edit(path, lambda tensors: tensors.update({name: tensors[name].to(torch.bfloat16)}))
    (problem,) = problems("hf", path, "native", tmp_path / "result")
    assert "layers.2.mlp.experts.up.weight: its experts are stored as bfloat16 and float32; store them all" in problem


def test_experts_in_several_files_are_gathered(save_model, tmp_path):
    path = save_model("mixtral", shard="20KB")
    assert len([*path.glob("*.safetensors")]) > 5
    convert("mixtral_hf", path, "hf", tmp_path / "result")
    assert bits(tmp_path / "result") == bits(path)


def test_what_a_deepseek_v2_cannot_be_is_refused_at_once():
    raw = json.loads(DEEPSEEK_V2_LITE) | {
        **{"head_dim": 128, "qk_head_dim": 191, "num_key_value_heads": 8, "topk_method": "noaux_tc"},
        **{"n_shared_experts": None, "intermediate_size": None, "norm_topk_prob": True, "moe_layer_freq": 2},
        **{"scoring_func": "sigmoid", "attention_bias": True, "num_nextn_predict_layers": 1},
    }
    with pytest.raises(MtError) as error:
        read_config(raw, FAMILIES, "config.json")
    assert sorted(str(problem).removeprefix("config.json: ") for problem in error.value.problems) == [
        "attention_bias is True; only False is implemented for deepseek_v2",
        "has num_nextn_predict_layers = 1; not known for deepseek_v2: remove what does not change the model's results; "
        "else it cannot be read",
        "head_dim is 128; only 64 is implemented, which other keys give",
        "intermediate_size is None; the first layers need it",
        "moe_layer_freq is 2; only 1 is implemented",
        "n_shared_experts is None; it must be a positive integer",
        "norm_topk_prob is True; only False is implemented",
        "num_key_value_heads is 8; only 16 is implemented, which other keys give",
        "qk_head_dim is 191; only 192 is implemented, which other keys give",
        "scoring_func is 'sigmoid'; only 'softmax' is implemented for deepseek_v2",
        "topk_method is 'noaux_tc'; allowed: greedy, group_limited_greedy",
    ]


def test_what_a_deepseek_v3_cannot_be_is_refused_at_once(save_model):
    raw = json.loads((save_model("deepseek_v3") / "config.json").read_text())
    raw |= {"rope_interleave": False, "norm_topk_prob": None, "topk_method": "greedy"}
    with pytest.raises(MtError) as error:
        read_config(raw, FAMILIES, "config.json")
    assert sorted(str(problem).removeprefix("config.json: ") for problem in error.value.problems) == [
        "has no norm_topk_prob; of deepseek_v3 it must be given",
        "rope_interleave is False; only True is implemented",
        "topk_method is 'greedy'; only 'noaux_tc' is implemented for deepseek_v3",
    ]


def test_layers_of_a_deepseek_v3_that_predict_further_tokens_are_refused_by_name(save_model, tmp_path):
    path = save_model("deepseek_v3")
    raw = json.loads((path / "config.json").read_text())
    assert raw["num_nextn_predict_layers"] == 1  # as transformers writes without such a layer
    last, stem = raw["num_hidden_layers"], "model.layers"

    def add_layer(tensors):
        block = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{stem}.{last - 1}.")}
        tensors |= {name.replace(f".{last - 1}.", f".{last}.", 1): tensor.clone() for name, tensor in block.items()}
        tensors |= {f"{stem}.{last}.eh_proj.weight": torch.zeros(32, 64), f"{stem}.{last}.enorm.weight": torch.ones(32)}

    edit(path, add_layer)
    (problem,) = problems("hf", path, "native", tmp_path / "result")
    assert re.search(
        rf"{stem}\.{last}\.\*: \d+ tensors of layers that predict further tokens, num_nextn_predict_layers = 1; "
        "mt predicts the next token alone: leave them out, as save_pretrained of transformers does$",
        problem,
    )


def test_the_published_config_of_deepseek_v2_lite_is_the_preset():
    read = read_config(json.loads(DEEPSEEK_V2_LITE), FAMILIES, "config.json")
    preset = load_run_config([], [], "deepseek-v2-lite", rules=False).model
    assert read.mlp.aux_loss_coeff == 0  # which config.json does not carry
    part = preset.mlp.model_copy(update={"aux_loss_coeff": 0.0})
    assert read == preset.model_copy(update={"mlp": part, "init_std": 0.02})


def test_a_shared_expert_of_another_width_is_no_deepseek_v2():
    config = ours(**DEEPSEEK | {"mlp": DEEPSEEK["mlp"] | {"shared_ffn_hidden_size": 40}})
    with pytest.raises(MtError, match=r"mlp\.shared_ffn_hidden_size = 40, not a multiple of 24"):
        choose_family(config, "deepseek_v2")


def test_mixtral_hf_reads_only_mixtral(save_model, tmp_path):
    (problem,) = problems("mixtral_hf", save_model("qwen3_moe"), "native", tmp_path / "result")
    assert re.search(r"model_type is 'qwen3_moe'; this loader reads mixtral$", problem)


def test_a_fused_tensor_of_phi3_of_the_wrong_width_is_refused(save_model, tmp_path):
    path = save_model("phi3")
    name = "model.layers.0.self_attn.qkv_proj.weight"
    edit(path, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    (problem,) = problems("hf", path, "native", tmp_path / "result")
    assert "layers.0.attn.v.weight: tensor has shape (15, 32); the model needs (16, 32)" in problem


def test_a_model_of_several_families_takes_the_first_or_the_one_asked_for():
    config = ours(attention={"window": 6})
    assert choose_family(config).model_type == "mistral"
    assert choose_family(config, "phi3").model_type == "phi3"
