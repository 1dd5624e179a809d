"""BERT and T5 in Megatron-Core's files: the same bits and settings come back from every layout, format and name."""

import json

import pytest
import torch

from ckpt.conftest import bits
from ckpt.megatron.legacy.legacy_checkpoints import random_weights
from ckpt.megatron.test_round_trip import read_tensors, sizes
from ckpt.test_ckpt_command import mt_ckpt
from mt_ckpt.conversion.convert import convert
from mt_ckpt.megatron.args.t5 import NORM_NOTES
from mt_ckpt.megatron.loader import MegatronCoreLoader
from mt_ckpt.megatron.saver import save
from mt_ckpt.megatron.torch_format import safe_unpickle
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.checkpoint.native import write_model
from mt_core.errors import MtError
from mt_models.config import BertConfig, T5Config

SHARED = {
    "layers": 4,
    "hidden_size": 16,
    "vocab_size": 61,
    "max_seq_len": 12,
    "attention": {"heads": 4, "num_kv_heads": 4, "head_size": 6, "qkv_bias": True, "out_bias": True},
    "mlp": {"kind": "dense", "ffn_hidden_size": 20, "activation": "gelu_tanh", "bias": True},
    "norm": {"kind": "layer"},
    "vocab_divisor": 8,
}
BERT = BertConfig.model_validate(SHARED | {"head_activation": "gelu"})
"""With Megatron's defaults: the blocks' GELU is fused with a bias, and the head's exact."""
PLAIN_BERT = BertConfig.model_validate(
    SHARED | {"mlp": SHARED["mlp"] | {"activation": "gelu"}, "binary_head": False, "pooler": False, "token_types": 0}
)
T5 = T5Config.model_validate(
    SHARED | {"decoder_layers": 3, "position": {"kind": "learned"}, "tied": True, "head_bias": True}
)
RELATIVE_T5 = T5Config.model_validate(
    SHARED
    | {"decoder_layers": 3, "position": {"kind": "relative", "buckets": 8, "max_distance": 20}, "tied": False}
    | {"mlp": {"kind": "gated", "ffn_hidden_size": 20, "activation": "silu"}, "norm": {"kind": "rms"}}
    | {"attention": {"heads": 4, "num_kv_heads": 4, "head_size": 6}}
)
BARE_T5 = T5.model_copy(update={"final_norm": False})
MODELS = {"bert": BERT, "plain bert": PLAIN_BERT, "t5": T5, "bare t5": BARE_T5, "relative t5": RELATIVE_T5}


@pytest.fixture
def native(tmp_path):
    """`native(config)` → a native checkpoint of random weights."""

    def make(config, dtype=torch.float32):
        weights = random_weights(config, dtype)
        write_model(tmp_path / "native", config.model_dump(mode="json"), weights.items())
        return tmp_path / "native"

    return make


OPTIONS = [
    ("bert", sizes(2, 2, 2)),
    ("plain bert", sizes(1, 2) | {"saver_transformer_impl": "local"}),
    ("t5", sizes(1) | {"saver_transformer_impl": "local"}),
    ("t5", sizes(2)),
    ("relative t5", sizes(2)),
    *((model, sizes(2) | {"target_ckpt_format": "torch_dist"}) for model in MODELS),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "options"), OPTIONS, ids=str)
def test_the_same_bits_and_settings_come_back(model, options, native, tmp_path):
    source = native(MODELS[model], torch.bfloat16)
    kind = MODELS[model].kind.upper()
    convert("native", source, "core", tmp_path / "core", model_type=kind, options=options)
    convert("core", tmp_path / "core", "native", tmp_path / "back", model_type=kind)
    assert read_tensors(tmp_path / "core") == read_tensors(tmp_path / "back") == read_tensors(source)
    assert open_checkpoint(tmp_path / "back").config() == MODELS[model]


@pytest.mark.slow
@pytest.mark.parametrize("saver", ["core", "legacy"])
@pytest.mark.parametrize("model", ["bert", "t5"])
def test_the_command_converts_them(model, saver, native, tmp_path):
    options = ["--model-type", model.upper(), "--target-tensor-parallel-size", 2, "--verify"]
    there = mt_ckpt(
        "convert", "--load-dir", native(MODELS[model]), "--saver", saver, "--save-dir", tmp_path / "new", *options
    )
    assert f"wrote {tmp_path / 'new'}: {len(MODELS[model].canonical_shapes())} tensors" in there.stdout
    options = ["--saver", "native", "--save-dir", tmp_path / "back", "--model-type", model.upper()]
    mt_ckpt("convert", "--load-dir", tmp_path / "new", *options)
    assert read_tensors(tmp_path / "back") == read_tensors(tmp_path / "native")
    with pytest.raises(MtError, match=f"--model-type GPT: .* holds a '{model}' model; use {model}"):
        mt_ckpt("convert", "--load-dir", tmp_path / "new", *options[:-1], "GPT")


@pytest.mark.parametrize("saver", ["core", "legacy"])
def test_megatron_bert_of_hugging_face_goes_there_and_back(saver, save_model, tmp_path):
    source = save_model("megatron-bert", auto_class="AutoModelForPreTraining", hidden_act="gelu")
    convert("hf", source, saver, tmp_path / "new", options=sizes(2), verify=True)
    convert(saver, tmp_path / "new", "hf", tmp_path / "back", verify=True)
    assert bits(tmp_path / "back") == bits(source)


def test_t5_of_hugging_face_is_refused_with_the_reason(save_model, tmp_path):
    source = save_model("t5", auto_class="AutoModelForSeq2SeqLM")
    with pytest.raises(MtError) as error:
        convert("hf", source, "core", tmp_path / "new")
    problems = [str(problem).partition("; ")[0] for problem in error.value.problems]
    assert problems == [
        "saver core: cannot carry attention.scale = 1.0, as T5 of Hugging Face has it",
        "saver core: cannot carry mlp.activation = 'gelu_tanh'",
    ]


def test_berts_stages_have_the_names_of_the_specification(tmp_path):
    save(tmp_path / "core", BERT, random_weights(BERT).items(), **sizes(2, 2))
    first, last = (
        safe_unpickle.read(tmp_path / "core/release" / f"mp_rank_01_00{stage}/model_optim_rng.pt") for stage in (0, 1)
    )
    assert first["args"].bert_binary_head is True
    assert (first["args"].bias_gelu_fusion, first["args"].openai_gelu) == (True, False)
    outside = {name: tuple(one.shape) for name, one in first["model"].items() if "layers" not in name}
    assert outside == {
        "embedding.word_embeddings.weight": (32, 16),
        "embedding.position_embeddings.weight": (12, 16),
        "embedding.tokentype_embeddings.weight": (2, 16),
    }
    state = last["model"]
    assert state["encoder.layers.1.mlp.linear_fc1.layer_norm_weight"].shape == (16,)
    assert state.pop("output_layer._extra_state") is None
    assert state.pop("encoder.final_layernorm._extra_state").numel() == 0
    assert {name: tuple(one.shape) for name, one in state.items() if "layers" not in name} == {
        "encoder.final_layernorm.weight": (16,),
        "encoder.final_layernorm.bias": (16,),
        "lm_head.dense.weight": (16, 16),
        "lm_head.dense.bias": (16,),
        "lm_head.layer_norm.weight": (16,),
        "lm_head.layer_norm.bias": (16,),
        "output_layer.weight": (32, 16),
        "output_layer.bias": (32,),
        "pooler.dense.weight": (16, 16),
        "pooler.dense.bias": (16,),
        "binary_head.weight": (2, 16),
        "binary_head.bias": (2,),
    }


def test_t5s_cross_attention_is_laid_out_by_head_and_its_copies_are_written(tmp_path):
    weights = random_weights(T5)
    save(tmp_path / "core", T5, weights.items(), **sizes(2))
    state = safe_unpickle.read(tmp_path / "core/release/mp_rank_01/model_optim_rng.pt")
    args, state = state["args"], state["model"]
    assert (args.num_layers, args.encoder_num_layers, args.decoder_num_layers) == (4, 4, 3)
    k, v = (weights[f"decoder.layers.2.cross.{part}.weight"].unflatten(0, (4, 6)) for part in "kv")
    right = torch.cat([k[2], v[2], k[3], v[3]])  # of the second rank's two heads
    assert torch.equal(state["decoder.layers.2.cross_attention.linear_kv.weight"], right)
    assert torch.equal(state["position_embeddings.weight"], state["embedding.position_embeddings.weight"])
    assert torch.equal(state["lm_head.output_layer.bias"], state["output_layer.bias"])
    assert "decoder.layers.0.pre_cross_attn_layernorm.weight" in state
    assert "decoder.layers.0.cross_attention.core_attention._extra_state" in state


def test_a_t5_that_newer_releases_would_compute_otherwise_is_noted(tmp_path, capsys):
    for name, config in {"bare": BARE_T5, "with norms": T5}.items():
        save(tmp_path / name, config, random_weights(config).items())
        assert NORM_NOTES[config.final_norm] in capsys.readouterr().err


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_a_copy_that_differs_is_reported(form, tmp_path):
    save(tmp_path / "core", T5, random_weights(T5).items(), target_ckpt_format=form)
    directory = tmp_path / "core" / "release"
    if form == "torch":
        path = directory / "mp_rank_00/model_optim_rng.pt"
        state = torch.load(path, weights_only=False)
        state["model"]["position_embeddings.weight"] += 1
        torch.save(state, path)
    else:
        from mt_ckpt.megatron.dist_format.metadata import read_metadata

        (chunk,) = read_metadata(directory)["position_embeddings.weight"].chunks
        content = chunk.file.read_bytes()
        record = bytearray(content[chunk.start : chunk.start + chunk.length])
        raw = chunk.read().numpy().tobytes()
        record[record.index(raw) + 3] ^= 1
        chunk.file.write_bytes(content[: chunk.start] + bytes(record) + content[chunk.start + chunk.length :])
    message = "position_embeddings.weight: differs from embedding.position_embeddings.weight, whose copy it is"
    with pytest.raises(MtError, match=message):
        dict(MegatronCoreLoader(tmp_path / "core").tensors())


CANNOT = {
    "heads": (
        BERT,
        {"head_activation": None},
        "cannot carry head_activation = 'gelu_tanh', with 'gelu_tanh' in blocks",
    ),
    "no biases": (
        BERT,
        {"mlp": {"kind": "dense", "ffn_hidden_size": 20}},
        "cannot carry mlp.activation = 'gelu_tanh' without biases; Megatron fuses this GELU with a bias",
    ),
    "order of norms": (BERT, {"norm_place": "after"}, "cannot carry norm_place = 'after'; Megatron's has 'before'"),
    "scale": (
        RELATIVE_T5,
        {"attention": {"heads": 4, "num_kv_heads": 4, "head_size": 6, "scale": 1.0}},
        "attention.scale = 1.0, as T5 of Hugging Face has it; Megatron divides scores by the square root of head_size",
    ),
    "groups": (
        RELATIVE_T5,
        {"attention": {"heads": 4, "num_kv_heads": 2, "head_size": 6}},
        "cannot carry attention.num_kv_heads = 2; Megatron's cross attention has as many as heads",
    ),
    "GeGLU": (
        RELATIVE_T5,
        {"mlp": {"kind": "gated", "ffn_hidden_size": 20, "activation": "gelu_tanh"}},
        "cannot carry mlp.activation = 'gelu_tanh'",
    ),
    "scaled head": (T5, {"scaled_head": True}, "cannot carry scaled_head = True; Megatron's has False"),
    "no bias of the head": (T5, {"head_bias": False}, "cannot carry head_bias = False; Megatron's has True"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_megatron_cannot_be_told_is_refused(case, tmp_path):
    config, changes, message = CANNOT[case]
    with pytest.raises(MtError, match=message):
        save(tmp_path / "core", type(config).model_validate(config.model_dump() | changes), ())


TOLD = {
    "rope": (BERT, {"position_embedding_type": "rope"}, "position_embedding_type is 'rope'; of bert: learned_absolute"),
    "untied": (
        BERT,
        {"untie_embeddings_and_output_weights": True},
        "untie_embeddings_and_output_weights is True; of bert: False",
    ),
    "experts": (
        BERT,
        {"num_experts": 4, "swiglu": True, "add_bias_linear": False},
        "args.num_experts is 4; of bert: None",
    ),
    "window": (BERT, {"window_size": [3, 0]}, "attention.window is for models in which tokens see only those before"),
}


@pytest.mark.parametrize("case", TOLD)
def test_args_that_ask_for_what_we_lack_are_refused(case, tmp_path):
    config, given, message = TOLD[case]
    save(tmp_path / "core", config, random_weights(config).items(), target_ckpt_format="torch_dist")
    (tmp_path / "args.json").write_text(json.dumps(given))
    with pytest.raises(MtError, match=message):
        MegatronCoreLoader(tmp_path / "core", megatron_args=tmp_path / "args.json").config()
