"""Keys of config.json that no table reads: those of transformers' own files are ignored, unheard-of ones refused."""

import json

import pytest
import transformers

from ckpt.conftest import FAMILIES as SIZES
from mt_ckpt.huggingface.config import read_config, write_config
from mt_ckpt.huggingface.families import FAMILIES
from mt_ckpt.huggingface.families.ignored_keys import ANY
from mt_core.errors import MtError

DEFAULTS = {
    "t5": {"feed_forward_proj": "gated-gelu"},  # of T5, only v1.1 is implemented
    "deepseek_v2": {"num_experts_per_tok": 6},  # which has no default
}
REAL = {
    "llama": "is_llama_config transformers.js_config pretraining_tp rope_interleaved max_sequence_length auto_map",
    "mistral": "torch_dtype use_cache _name_or_path _model_name_or_path",
    "mixtral": "output_router_logits router_aux_loss_coef router_jitter_noise",
    "qwen2": "max_window_layers use_mrope use_sliding_window sliding_window",
    "qwen3_moe": "intermediate_size output_router_logits router_aux_loss_coef mlp_only_layers decoder_sparse_step",
    "deepseek_v2": "aux_loss_alpha seq_aux ep_size scoring_func moe_layer_freq norm_topk_prob pretraining_tp auto_map",
    "gemma2": "cache_implementation hidden_act sliding_window_size _attn_implementation",
    "phi3": "auto_map embd_pdrop resid_pdrop attention_bias lm_head_bias tie_word_embeddings",
    "gpt2": "n_ctx _num_labels summary_type task_specific_params reorder_and_upcast_attn predict_special_tokens",
    "bert": "directionality pooler_fc_size pooler_num_attention_heads pooler_type gradient_checkpointing id2label",
    "t5": "is_gated_act output_past decoder_start_token_id task_specific_params tokenizer_class classifier_dropout",
}
"""Keys that files on the hub have."""
VALUES = {"sliding_window": None, "hidden_act": "gelu_pytorch_tanh", "is_gated_act": True, "mlp_only_layers": []}
VALUES |= dict.fromkeys(
    ("rope_interleaved", "use_mrope", "use_sliding_window", "attention_bias", "lm_head_bias"), False
)
VALUES |= {"scoring_func": "softmax", "moe_layer_freq": 1, "norm_topk_prob": False}
VALUES |= {"tie_word_embeddings": False, "decoder_sparse_step": 1, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


def default_config(family, *, whole):
    """config.json of the family as transformers fills it in, in full or without what all models share."""
    config = getattr(transformers, f"{SIZES[family][0]}Config")(**DEFAULTS.get(family, {}))
    return json.loads(config.to_json_string(use_diff=not whole))


def refusals(raw):
    with pytest.raises(MtError) as refused:
        read_config(raw, FAMILIES, "config.json")
    return [str(problem) for problem in refused.value.problems]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("whole", [True, False])
def test_what_transformers_writes_by_default_is_read(family, whole):
    raw = default_config(family, whole=whole)
    config = read_config(raw, FAMILIES, "config.json")
    assert read_config(write_config(FAMILIES[family], config), FAMILIES, "config.json") == config


@pytest.mark.parametrize("family", REAL)
def test_keys_of_files_on_the_hub_are_read_or_ignored(family):
    usual = {name: VALUES.get(name, 4096) for name in REAL[family].split()}
    raw = default_config(family, whole=False)
    assert read_config(raw | usual, FAMILIES, "config.json") == read_config(raw, FAMILIES, "config.json")


@pytest.mark.parametrize("family", FAMILIES)
def test_all_unknown_keys_are_one_line(family):
    raw = default_config(family, whole=False) | {"softmax_plus_one": False, "value_residual": 0.5}
    (problem,) = refusals(raw)
    assert problem.startswith("config.json: has softmax_plus_one = False, value_residual = 0.5; not known for")
    assert "remove what does not change the model's results" in problem


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gpt2", "gemma2", "t5", "mixtral"])
def test_attention_that_is_not_causal_is_refused(family):
    for value in (False, None):  # of both, transformers makes a bidirectional mask
        (problem,) = refusals(default_config(family, whole=False) | {"is_causal": value})
        assert problem == f"config.json: is_causal is {value}; only True is implemented for {family}"
    assert read_config(default_config(family, whole=False) | {"is_causal": True}, FAMILIES, "config.json")


@pytest.mark.parametrize(
    ("key", "off", "on"),
    [
        ("attention_bias", False, True),
        ("sliding_window", None, 8),
        ("use_qk_norm", False, True),
        ("use_sliding_window", False, True),
        ("add_cross_attention", False, True),
        ("pruned_heads", {}, {"0": [1]}),
        ("attn_logit_softcapping", None, 30.0),
    ],
)
def test_a_switch_of_another_family_may_be_off(key, off, on):
    raw = default_config("gpt2", whole=False)
    assert read_config(raw | {key: off}, FAMILIES, "c") == read_config(raw, FAMILIES, "c")
    (problem,) = refusals(raw | {key: on})
    assert problem.startswith(f"config.json: {key} is {on}; only {off}")


def test_no_family_ignores_what_it_reads():
    for family in FAMILIES.values():
        read = {name for key in family.keys.values() for name in (key.name, *key.also)} | {*family.required}
        careless = {name for name in read if family.ignored.get(name) is ANY}
        assert careless <= {"initializer_range"}, family.model_type
