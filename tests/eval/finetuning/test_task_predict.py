"""`mt task predict` without training, `mt task glue --task-name sts-b`, and thresholds of ensembles, as commands."""

import json

import pytest
import torch
from typer.testing import CliRunner

from eval.finetuning.task_files import entailment_rows, write_bert, write_mnli, write_tsv
from mt_core.errors import MtError
from mt_eval.finetuning.command import app
from mt_eval.finetuning.predictions import Prediction, read_predictions, write_predictions
from mt_eval.load import Checkpoint
from tiny import metrics

pytestmark = pytest.mark.slow

QUICK = ["--set", "runtime.device=cpu", "--set", "runtime.threads=1", "--seq-length", "24"]
CPU = ["--device", "cpu"]


def mt_task(*words):
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def refusal(*words):
    with pytest.raises(MtError) as error:
        mt_task(*words)
    return str(error.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy BERT tuned for MNLI, and its files."""
    folder = tmp_path_factory.mktemp("predict")
    write_bert(folder)
    rows = entailment_rows()
    write_mnli(folder / "train.tsv", rows[:16])
    write_mnli(folder / "dev.tsv", rows[5:16])
    write_mnli(folder / "test.tsv", rows[:3], labelled=False)
    mt_task(
        *("mnli", "--load-dir", folder / "bert", "--train-data", folder / "train.tsv", "--save-dir", folder / "run"),
        *("--valid-data", folder / "dev.tsv", "--epochs", 1, "--micro-batch-size", 4, "--global-batch-size", 8),
        *("--lr", 1e-2, *QUICK),
    )
    return folder


def test_a_run_predicts_further_files_without_training(folder, tmp_path):
    before = sorted(path for path in folder.rglob("*") if path.is_file())
    words = ["predict", "--load-dir", folder / "run", "--data", folder / "dev.tsv", folder / "test.tsv", *CPU]
    printed = mt_task(*words, "--save-dir", tmp_path / "out", "--batch-size", 3)
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == before
    ours, theirs = (read_predictions(path / "dev.jsonl") for path in (tmp_path / "out", folder / "run/predictions"))
    assert [(each.uid, each.label) for each in ours] == [(each.uid, each.label) for each in theirs]
    for each, other in zip(ours, theirs, strict=True):
        assert each.scores == pytest.approx(dict(other.scores), abs=1e-6)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["dev"] == json.loads((folder / "run/predictions/summary.json").read_text())["dev"]
    assert "test  no labels" in printed
    assert "--save-dir: " in refusal(*words, "--save-dir", tmp_path / "out")


def test_the_order_of_another_checkpoint_s_classes_has_to_be_named(folder, tmp_path):
    from mt_ckpt.conversion.convert import convert

    convert("native", folder / "run", "hf", tmp_path / "hf")
    words = ["predict", "--load-dir", tmp_path / "hf", "--data", folder / "dev.tsv", "--save-dir", tmp_path / "out"]
    words += [*CPU, "--seq-length", 24]
    assert "hf: is no run of mt task; --task-name, one of race, cola, mnli," in refusal(*words)
    words += ["--task-name", "mnli"]
    assert "which of contradiction, entailment, neutral each logit is, its files do not say for sure" in refusal(*words)
    assert "--classes: yes no; these in the order of the logits" in refusal(*words, "--classes", "yes", "no")
    mt_task(*words, "--classes", "neutral", "contradiction", "entailment")
    expected = read_predictions(folder / "run" / "predictions" / "dev.jsonl")
    for ours, theirs in zip(read_predictions(tmp_path / "out" / "dev.jsonl"), expected, strict=True):
        assert ours.label == theirs.label
        assert list(ours.scores) == list(theirs.scores)
        old = [theirs.scores[name] for name in ("contradiction", "entailment", "neutral")]
        new = [ours.scores[name] for name in ("neutral", "contradiction", "entailment")]
        assert new == pytest.approx(old, abs=1e-6)


def test_a_run_without_files_to_evaluate_has_no_predictions(folder, tmp_path):
    printed = mt_task(
        *("mnli", "--load-dir", folder / "bert", "--train-data", folder / "train.tsv", "--save-dir", tmp_path / "run"),
        *("--epochs", 1, "--micro-batch-size", 8, "--global-batch-size", 16, *QUICK),
    )
    assert "right" not in printed
    assert (tmp_path / "run" / "step-00000001").is_dir()
    assert not (tmp_path / "run" / "predictions").exists()


def test_what_a_checkpoint_cannot_predict_is_refused(folder, tmp_path):
    words = ["predict", "--data", folder / "dev.tsv", "--save-dir", tmp_path / "out", *CPU, "--load-dir"]
    assert "has no head for a task; the task needs {'kind': 'classification', 'classes': 3}" in refusal(
        *words, folder / "bert", "--task-name", "mnli", "--classes", "contradiction", "entailment", "neutral"
    )
    assert "checkpoint: has the head {'kind': 'classification', 'classes': 3}; the task needs" in refusal(
        *words, folder / "run", "--task-name", "rte"
    )
    assert "--task-name: unknown task 'mlni'; did you mean 'mnli'?" in refusal(
        *words, folder / "run", "--task-name", "mlni"
    )
    assert "--seq-length: 64; at most 48, its positions" in refusal(*words, folder / "run", "--seq-length", 64)
    assert "--max-qa-length: 8, but the task is mnli; leave it out" in refusal(
        *words, folder / "run", "--max-qa-length", 8
    )


def test_sts_b_is_learnt_and_predicted_as_numbers(folder, tmp_path):
    rows = [(str(n), *pair[:2], f"{5 * (pair[2] == 'entailment')}.0") for n, pair in enumerate(entailment_rows()[:17])]
    names = ("index", "sentence1", "sentence2", "score")
    train = write_tsv(tmp_path / "train.tsv", names, *rows)
    dev = write_tsv(tmp_path / "dev.tsv", names, *rows[:5])
    test = write_tsv(tmp_path / "test.tsv", names[:3], *(row[:3] for row in rows[:2]))
    run = tmp_path / "run"
    printed = mt_task(
        *("glue", "--task-name", "sts-b", "--load-dir", folder / "bert", "--train-data", train, "--save-dir", run),
        *("--valid-data", dev, "--test-data", test, "--epochs", 3, "--micro-batch-size", 2, "--global-batch-size", 4),
        *("--lr", 1e-2, *QUICK),
    )
    predictions = read_predictions(run / "predictions" / "dev.jsonl")
    assert [each.label for each in predictions] == [5.0, 0.0, 5.0, 0.0, 5.0]
    error = sum((each.prediction - each.label) ** 2 for each in predictions) / 5
    evaluated = [line for line in metrics(run) if "valid_loss" in line]
    assert evaluated[-1]["valid_loss"] == pytest.approx(error, rel=1e-4)  # the mean over five, not over six
    assert "accuracy" not in str(evaluated)
    assert "dev   5 examples, pearson " in printed
    summary = json.loads((run / "predictions" / "summary.json").read_text())
    assert summary["dev"].keys() == {"labelled", "pearson", "pearson_stderr", "spearman", "spearman_stderr"}
    assert summary["test"] == {"labelled": 0}
    line = json.loads((run / "predictions" / "test.jsonl").read_text().splitlines()[0])
    assert (line["label"], line["prediction"]) == (None, line["scores"]["score"])
    again = ["predict", "--load-dir", run, "--data", dev, "--save-dir", tmp_path / "again", *CPU]
    mt_task(*again)
    for ours, theirs in zip(read_predictions(tmp_path / "again" / "dev.jsonl"), predictions, strict=True):
        assert ours.prediction == pytest.approx(theirs.prediction, abs=1e-5)
    mt_task("ensemble", run, run, "--save-dir", tmp_path / "both")
    for ours, theirs in zip(read_predictions(tmp_path / "both" / "dev.jsonl"), predictions, strict=True):
        assert ours.prediction == pytest.approx(theirs.prediction)
    tensors = dict(Checkpoint.open(run).loader.tensors())
    assert tensors["task_head.weight"].shape == (1, 16)
    assert torch.isfinite(tensors["task_head.weight"]).all()


def test_an_ensemble_predicts_by_its_threshold(tmp_path):
    scores = {"dev": [(0.30, "0"), (0.36, "1"), (0.9, "1")], "test": [(0.34, None), (0.2, None)]}
    for run in ("a", "b"):
        for name, rows in scores.items():
            predictions = [Prediction(str(n), label, {"0": 1 - p, "1": p}) for n, (p, label) in enumerate(rows)]
            write_predictions(tmp_path / run / "predictions" / f"{name}.jsonl", predictions)
    words = ["ensemble", tmp_path / "a", tmp_path / "b"]
    printed = mt_task(*words, "--save-dir", tmp_path / "tuned", "--tune-threshold", "dev")
    assert printed.startswith("threshold  0.35, chosen on dev\ndev   3 of 3 right")
    lines = [json.loads(line) for line in (tmp_path / "tuned" / "test.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in lines] == ["0", "0"]
    assert mt_task(*words, "--save-dir", tmp_path / "given", "--threshold", 0.3).startswith("threshold  0.30\ndev ")
    lines = [json.loads(line) for line in (tmp_path / "given" / "test.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in lines] == ["1", "0"]
