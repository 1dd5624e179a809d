"""Losses on hidden words: those of transformers on the same samples, and what cannot be evaluated is refused."""

import json

import pytest
import torch
from typer.testing import CliRunner

from mt_core.checkpoint import native
from mt_core.errors import MtError
from mt_data.datasets.bert import build_splits
from mt_data.tokenizers.build import build_tokenizer
from mt_eval.finite import NonFiniteOutput
from mt_eval.load import Checkpoint
from mt_eval.tasks.command import app
from mt_eval.tasks.masked import HeldOut, make_data_section
from mt_models.canonical import canonical_state
from mt_models.config import BertConfig
from word_pieces import toy_corpus, toy_tokenizer

SIZES = {"layers": 1, "hidden_size": 16, "vocab_size": 32, "max_seq_len": 24, "init_std": 0.5}
ATTENTION = {"heads": 2, "num_kv_heads": 2, "head_size": 8, "qkv_bias": True, "out_bias": True}
BERT = SIZES | {
    "kind": "bert",
    "attention": ATTENTION,
    "mlp": {"kind": "dense", "ffn_hidden_size": 32, "activation": "gelu", "bias": True},
    "norm": {"kind": "layer", "eps": 1e-12},
    "norm_place": "after",
    "dropout": {"attention": 0.1, "hidden": 0.1, "embedding": 0.1},
}


@pytest.fixture
def tokenizer_files(tmp_path):
    directory = tmp_path / "tokenizer"
    build_tokenizer(toy_tokenizer(tmp_path)).save(directory)
    return sorted(directory.glob("*"))


def save(folder, tokenizer_files, name="model", **changes):
    """A native checkpoint of a model alone, without a run."""
    config = BertConfig.model_validate(BERT | changes)
    model = config.build()
    model.initialize(3)
    native.write_model(folder / name, config.model_dump(), canonical_state(model).items(), tokenizer_files)
    return folder / name


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in (*words, "--device", "cpu")], catch_exceptions=False)


def test_a_model_with_nan_has_no_loss(tmp_path, tokenizer_files):
    checkpoint, corpus = save(tmp_path, tokenizer_files), toy_corpus(tmp_path)
    source = Checkpoint.open(checkpoint).loader
    tensors = {name: tensor.clone() for name, tensor in source.tensors()}
    tensors["embed.weight"][20] = float("nan")
    native.write_model(tmp_path / "broken", source.config().model_dump(), tensors.items(), tokenizer_files)
    with pytest.raises(
        NonFiniteOutput, match=r"broken: sample \d+: the model computes a loss that is not finite"
    ) as error:
        run("masked-lm", "--load-dir", tmp_path / "broken", "--data", corpus, "--output", tmp_path / "r.json")
    assert error.value.exit_code == 1
    assert not (tmp_path / "r.json").exists()


def test_a_model_without_a_run_has_the_losses_that_transformers_has(tmp_path, tokenizer_files):
    transformers = pytest.importorskip("transformers")
    checkpoint, corpus = save(tmp_path, tokenizer_files), toy_corpus(tmp_path)
    output = tmp_path / "result.json"
    ran = run("masked-lm", "--load-dir", checkpoint, "--data", corpus, "--output", output, "--seed", 5)
    assert ran.exit_code == 0, ran.output
    found = json.loads(output.read_text())
    config = BertConfig.model_validate(BERT)
    section = make_data_section(config, {}, HeldOut(corpus), toy_tokenizer(tmp_path))
    assert section.classification_head
    samples = build_splits(section, samples=(0, None, 0), seed=5, cache_dir=tmp_path / "cache").valid
    from mt_ckpt.huggingface.saver import save as save_hf

    save_hf(tmp_path / "hf", config, Checkpoint.open(checkpoint).loader.tensors(), ())
    theirs = transformers.BertForPreTraining.from_pretrained(tmp_path / "hf").eval()
    batch = {name: torch.stack([torch.as_tensor(sample[name]) for sample in samples]) for name in samples[0]}
    with torch.no_grad():
        logits = theirs(batch["text"], attention_mask=batch["padding_mask"], token_type_ids=batch["types"])
    words, order = logits.prediction_logits.transpose(1, 2).double(), logits.seq_relationship_logits.double()
    losses_BT = torch.nn.functional.cross_entropy(words, batch["labels"], ignore_index=-1, reduction="none")
    sums_B, sizes_B = losses_BT.sum(-1), (batch["labels"] >= 0).sum(-1)
    order_B = torch.nn.functional.cross_entropy(order, batch["is_random"], reduction="none")
    hits_B, count = (order.argmax(-1) == batch["is_random"]).double(), len(samples)
    word_loss = (sums_B.sum() / sizes_B.sum()).item()
    clustered_B = (sums_B - word_loss * sizes_B) / sizes_B.sum()
    both_B = clustered_B + (order_B - order_B.mean()) / count
    expected = {
        "masked_lm_loss": word_loss,
        "masked_lm_loss_stderr": (clustered_B.square().sum() * count / (count - 1)).sqrt().item(),
        "sentence_order_loss": order_B.mean().item(),
        "sentence_order_loss_stderr": (order_B.std() / count**0.5).item(),
        "sentence_order_accuracy": hits_B.mean().item(),
        "sentence_order_accuracy_stderr": (hits_B.std() / count**0.5).item(),
        "loss": word_loss + order_B.mean().item(),
        "loss_stderr": (both_B.square().sum() * count / (count - 1)).sqrt().item(),
    }
    assert found["metrics"] == pytest.approx(expected, rel=1e-5)
    assert found["counts"] == {"samples": count}
    lines = [json.loads(line) for line in (tmp_path / "result.masked-lm.jsonl").read_text().splitlines()]
    assert [line["sample"] for line in lines] == list(range(count))
    assert [line["masked_lm_loss"]["sum"] for line in lines] == pytest.approx(sums_B.tolist(), rel=1e-5)
    assert [line["masked_lm_loss"]["size"] for line in lines] == sizes_B.tolist()
    assert [line["sentence_order_loss"]["sum"] for line in lines] == pytest.approx(order_B.tolist(), rel=1e-5)
    assert found["settings"] | {"batch_size": 0} == {
        "split": "0,1,0",
        "seed": 5,
        "seq_length": 24,
        "mask_prob": 0.15,
        "batch_size": 0,
        "device": "cpu",
        "dtype": "fp32",
        "tokenizer": "BertWordPieceCase",
    }


@pytest.mark.parametrize(
    ("task", "changes", "words", "message"),
    [
        ("span", {}, [], "holds a model of kind 'bert'; a model of kind t5"),
        ("masked-lm", {"lm_head": False}, [], "its model has no language-model head; one with model.lm_head = true"),
        ("masked-lm", {}, ["--seq-length", 25], "--seq-length: 25 tokens; 1 to 24, the model's positions"),
        ("masked-lm", {}, ["--split", "1,0,0"], "--split: '1,0,0' leaves none of "),
        ("masked-lm", {}, ["--split", "a"], "data.split: 'a'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(task, changes, words, message, tmp_path, tokenizer_files):
    checkpoint, corpus = save(tmp_path, tokenizer_files, **changes), toy_corpus(tmp_path)
    with pytest.raises(MtError) as error:
        run(task, "--load-dir", checkpoint, "--data", corpus, *words)
    assert message in str(error.value)


def test_a_gpt_is_refused(checkpoint, tmp_path):
    with pytest.raises(MtError, match="holds a model of kind 'gpt'; a model of kind bert"):
        run("masked-lm", "--load-dir", checkpoint, "--data", toy_corpus(tmp_path))


def test_a_corpus_that_is_not_there_is_named(tmp_path, tokenizer_files):
    with pytest.raises(MtError, match="nowhere"):
        run("masked-lm", "--load-dir", save(tmp_path, tokenizer_files), "--data", tmp_path / "nowhere")
