"""BERT, Megatron-BERT and T5 of Hugging Face, both ways."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt.conftest import bits, hugging_face_model
from mt_ckpt.conversion.convert import convert
from mt_ckpt.conversion.verify import our_logits, transformers_logits
from mt_ckpt.huggingface.saver import choose_family, save
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.errors import MtError
from mt_models.canonical import canonical_state
from mt_models.config import BertConfig, T5Config

WEIGHTS = "model.safetensors"
TOKENS_BT = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(1))
CLOSE = 5e-6
"""Allowed difference as a part of the largest number; fp32 sums in another order."""

ALL, MASKED, NEXT, BASE = (
    "AutoModelForPreTraining",
    "AutoModelForMaskedLM",
    "AutoModelForNextSentencePrediction",
    "AutoModel",
)
HEADS = {ALL: (True, True, True), MASKED: (True, False, False), NEXT: (False, True, True), BASE: (False, True, False)}


def differ(left, right):
    return ((left - right).abs().max() / right.abs().max()).item()


def heads(config):
    return config.lm_head, config.pooler, config.binary_head


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "megatron-bert"])
@pytest.mark.parametrize("auto_class", HEADS)
def test_bits_and_logits_of_bert_survive(family, auto_class, save_model, tmp_path):
    source = save_model(family, auto_class=auto_class, hidden_act="gelu_new", type_vocab_size=3)
    convert("hf", source, "native", tmp_path / "native", model_type="BERT")
    convert("native", tmp_path / "native", "hf", tmp_path / "hf")
    assert bits(tmp_path / "hf") == bits(source)
    expected = transformers_logits(source, TOKENS_BT)
    assert torch.equal(transformers_logits(tmp_path / "hf", TOKENS_BT), expected)
    assert differ(our_logits(open_checkpoint(tmp_path / "native"), TOKENS_BT), expected) <= CLOSE
    config = open_checkpoint(tmp_path / "hf").config()
    assert config == open_checkpoint(source).config()
    assert heads(config) == HEADS[auto_class]


def bert(**changes):
    values = {
        "layers": 2,
        "hidden_size": 32,
        "vocab_size": 61,
        "max_seq_len": 40,
        "attention": {"heads": 4, "num_kv_heads": 4, "head_size": 8, "qkv_bias": True, "out_bias": True},
        "mlp": {"kind": "dense", "ffn_hidden_size": 48, "bias": True},
        "norm": {"kind": "layer"},
        "init_std": 0.2,
    }
    return BertConfig.model_validate({"kind": "bert"} | values | changes)


TASKS = [
    ("BertForSequenceClassification", {"kind": "classification", "classes": 5}),
    ("MegatronBertForMultipleChoice", {"kind": "multiple_choice"}),
    ("BertForSequenceClassification", {"kind": "regression"}),
]


@pytest.mark.parametrize(("architecture", "head"), TASKS)
def test_heads_of_tasks_go_there_and_back(architecture, head, tmp_path):
    family, place = ("bert", "after") if architecture.startswith("Bert") else ("megatron-bert", "before")
    config = bert(norm_place=place, lm_head=False, binary_head=False, task_head=head)
    model = config.build()
    model.initialize(3)
    save(tmp_path / "ours", config, canonical_state(model).items())
    described = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (described["model_type"], described["architectures"]) == (family, [architecture])
    convert("hf", tmp_path / "ours", "native", tmp_path / "native", verify=True)
    assert open_checkpoint(tmp_path / "native").config() == open_checkpoint(tmp_path / "ours").config()
    assert open_checkpoint(tmp_path / "native").config().task_head == config.task_head
    expected = transformers_logits(tmp_path / "ours", TOKENS_BT)
    assert differ(model(TOKENS_BT).detach(), expected) <= CLOSE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"problem_type": "regression"},
            "problem_type is 'regression'; with num_labels = 2 only 'single_label_classification' is implemented",
        ),
        (
            {"problem_type": "multi_label_classification", "id2label": {"0": "score"}},
            "problem_type is 'multi_label_classification'; with num_labels = 1 only 'regression' is implemented",
        ),
    ],
)
def test_several_labels_and_several_numbers_are_refused(changes, message, tmp_path):
    config = bert(
        norm_place="after", lm_head=False, binary_head=False, task_head={"kind": "classification", "classes": 2}
    )
    model = config.build()
    model.initialize(3)
    save(tmp_path / "ours", config, canonical_state(model).items())
    path = tmp_path / "ours" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(MtError, match=message):
        open_checkpoint(tmp_path / "ours").config()


@pytest.mark.parametrize(("place", "family"), [("after", "bert"), ("before", "megatron-bert")])
@torch.no_grad()
def test_transformers_computes_with_our_bert(place, family, tmp_path):
    model = bert(norm_place=place).build()
    model.initialize(3)
    save(tmp_path / "ours", model.config, canonical_state(model).items())
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == family
    assert differ(transformers_logits(tmp_path / "ours", TOKENS_BT), model(TOKENS_BT)) <= CLOSE


def test_bert_as_first_published_is_read(save_model):
    """Norms with gamma and beta, copies of tied tensors, a buffer, no class in a sparse config.json."""
    path = save_model("bert", auto_class=ALL)
    expected = transformers_logits(path, TOKENS_BT)
    tensors = load_file(path / WEIGHTS)
    for name in [name for name in tensors if "LayerNorm" in name]:
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        tensors[old] = tensors.pop(name)
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    tensors["bert.embeddings.position_ids"] = torch.arange(40)[None]
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    raw = json.loads((path / "config.json").read_text())
    del raw["architectures"], raw["tie_word_embeddings"]
    (path / "config.json").write_text(json.dumps(raw))
    assert differ(our_logits(open_checkpoint(path), TOKENS_BT), expected) <= CLOSE


def problems(*args, **kwargs):
    with pytest.raises(MtError) as error:
        convert(*args, **kwargs)
    return [str(problem) for problem in error.value.problems]


def test_a_head_that_the_class_has_and_the_file_lacks_is_missing(save_model, tmp_path):
    path = save_model("bert", auto_class=MASKED)
    tensors = {name: t for name, t in load_file(path / WEIGHTS).items() if not name.startswith("cls.")}
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    reported = problems("hf", path, "native", tmp_path / "result")
    assert len(reported) == 5
    assert any("lm_head.dense.weight: tensor is missing" in problem for problem in reported)


def test_a_decoding_bert_is_refused(save_model, tmp_path):
    (problem,) = problems("hf", save_model("bert", auto_class=ALL, is_decoder=True), "native", tmp_path / "result")
    assert "is_decoder is True; only False is implemented" in problem


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (bert(pooler=True, binary_head=False), "lm_head = True, pooler = True, binary_head = False together"),
        (bert(token_types=0), "token_types = 0"),
        (bert(head_activation="gelu"), "head_activation = 'gelu' with mlp.activation = 'gelu_tanh'"),
        (bert(mlp={"kind": "gated", "ffn_hidden_size": 48, "bias": True}), "mlp.kind = 'gated'"),
    ],
)
def test_a_bert_that_no_family_carries_is_refused(config, message):
    with pytest.raises(MtError) as error:
        choose_family(config)
    assert all(message in str(problem) for problem in error.value.problems if "megatron-bert" in str(problem))
    assert len(error.value.problems) == 2


def test_a_bert_is_no_llama():
    with pytest.raises(MtError, match="saver hf: cannot write a 'bert' model; gpt; or --saver native"):
        choose_family(bert(), "llama")


SEQ2SEQ = "AutoModelForSeq2SeqLM"
T5_CASES = {
    "v1.1": {},
    "tied and scaled": {"tie_word_embeddings": True},
    "silu": {"feed_forward_proj": "gated-silu"},
}


@pytest.mark.parametrize("changes", T5_CASES.values(), ids=list(T5_CASES))
def test_bits_and_logits_of_t5_survive(changes, save_model, tmp_path):
    source = save_model("t5", auto_class=SEQ2SEQ, **changes)
    assert ("lm_head.weight" in bits(source)) == ("tie_word_embeddings" not in changes)
    convert("hf", source, "native", tmp_path / "native", model_type="T5")
    convert("native", tmp_path / "native", "hf", tmp_path / "hf")
    assert bits(tmp_path / "hf") == bits(source)
    expected = transformers_logits(source, TOKENS_BT)
    assert torch.equal(transformers_logits(tmp_path / "hf", TOKENS_BT), expected)
    assert differ(our_logits(open_checkpoint(tmp_path / "native"), TOKENS_BT), expected) <= CLOSE
    assert open_checkpoint(tmp_path / "hf").config() == open_checkpoint(source).config()


def t5(**changes):
    values = {
        "layers": 2,
        "decoder_layers": 3,
        "hidden_size": 32,
        "vocab_size": 61,
        "max_seq_len": 40,
        "attention": {"heads": 4, "num_kv_heads": 4, "head_size": 8, "scale": 1.0},
        "mlp": {"kind": "gated", "ffn_hidden_size": 48, "activation": "gelu_tanh"},
        "norm": {"kind": "rms"},
        "position": {"kind": "relative"},
        "init_std": 0.2,
    }
    return T5Config.model_validate({"kind": "t5"} | values | changes)


@pytest.mark.parametrize(("tied", "scaled"), [(False, False), (True, False), (True, True)])
@torch.no_grad()
def test_transformers_computes_with_our_t5(tied, scaled, tmp_path):
    model = t5(tied=tied, scaled_head=scaled).build()
    model.initialize(3)
    save(tmp_path / "ours", model.config, canonical_state(model).items())
    assert differ(transformers_logits(tmp_path / "ours", TOKENS_BT), model(TOKENS_BT)) <= CLOSE
    assert open_checkpoint(tmp_path / "ours").config() == model.config


def rewrite(path, **changes):
    raw = json.loads((path / "config.json").read_text()) | changes
    kept = {key: value for key, value in raw.items() if value is not None}
    (path / "config.json").write_text(json.dumps(kept))


def test_t5_as_older_releases_wrote_it_is_read(save_model):
    """No `scale_decoder_outputs`; copies of the embedding; a bias that nothing uses."""
    path = save_model("t5", auto_class=SEQ2SEQ)
    expected = transformers_logits(path, TOKENS_BT)
    tensors = load_file(path / WEIGHTS)
    for stack in ("encoder", "decoder"):
        tensors[f"{stack}.embed_tokens.weight"] = tensors["shared.weight"].clone()
    tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(8, 4)
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    rewrite(path, scale_decoder_outputs=None, tie_word_embeddings=False, dense_act_fn=None, is_gated_act=None)
    assert differ(our_logits(open_checkpoint(path), TOKENS_BT), expected) <= CLOSE


def test_an_untied_t5_without_its_output_layer_is_refused(save_model, tmp_path):
    path = save_model("t5", auto_class=SEQ2SEQ)
    tensors = load_file(path / WEIGHTS)
    del tensors["lm_head.weight"]
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    rewrite(path, scale_decoder_outputs=None, tie_word_embeddings=False)
    (problem,) = problems("hf", path, "native", tmp_path / "result")
    assert "head.weight: tensor is missing" in problem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj is 'relu'; of T5, only v1.1 is implemented: gated-gelu"),
        ({"dense_act_fn": "relu"}, "dense_act_fn is 'relu', against feed_forward_proj 'gated-gelu'; make them agree"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder is False; only True is implemented"),
    ],
)
def test_what_a_t5_asks_for_that_we_lack_is_refused(changes, message, save_model, tmp_path):
    path = save_model("t5", auto_class=SEQ2SEQ)
    rewrite(path, **changes)
    (problem,) = problems("hf", path, "native", tmp_path / "result")
    assert message in problem


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (t5(scaled_head=True), "scaled_head = True with tied = False"),
        (t5(mlp={"kind": "gated", "ffn_hidden_size": 48, "activation": "gelu"}), "mlp.activation = 'gelu'"),
        (t5(head_bias=True), "head_bias = True"),
    ],
)
def test_a_t5_that_the_family_does_not_carry_is_refused(config, message):
    with pytest.raises(MtError, match=f"saver hf: t5: cannot carry {message}"):
        choose_family(config)


def test_the_source_model_and_the_saved_one_agree(save_model):
    """The fixture's files are what transformers computes with."""
    model = hugging_face_model("bert", MASKED)
    assert torch.equal(transformers_logits(save_model("bert", auto_class=MASKED), TOKENS_BT), model(TOKENS_BT).logits)


def test_a_t5_without_norms_at_the_end_is_refused():
    attention = {"heads": 2, "num_kv_heads": 2, "head_size": 8, "scale": 1.0}
    sizes = {"layers": 1, "decoder_layers": 1, "hidden_size": 16, "vocab_size": 32, "max_seq_len": 16}
    parts = {"mlp": {"kind": "gated", "ffn_hidden_size": 24, "activation": "gelu_tanh"}, "norm": {"kind": "rms"}}
    config = T5Config.model_validate(
        sizes | parts | {"attention": attention, "position": {"kind": "relative"}, "final_norm": False}
    )
    with pytest.raises(MtError, match="final_norm = False"):
        choose_family(config)
    choose_family(config.model_copy(update={"final_norm": True}))
