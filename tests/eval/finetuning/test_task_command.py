"""`mt task` from files to predictions: evaluations apart and together, resumption, layouts, ensembles, bad input."""

import json
import resource
import statistics
from contextlib import contextmanager

import pytest
import torch
from typer.testing import CliRunner

from eval.finetuning.task_files import (
    entailment_rows,
    passage,
    write_bert,
    write_mnli,
    write_race,
    write_tsv,
)
from mt_core.checkpoint.native import steps
from mt_core.errors import MtError
from mt_eval.finetuning.command import app
from mt_eval.finetuning.predictions import Prediction, read_predictions, write_predictions
from mt_eval.load import Checkpoint
from tiny import metrics

pytestmark = pytest.mark.slow

QUICK = ["--set", "runtime.device=cpu", "--set", "runtime.threads=1", "--seq-length", "24"]


def mt_task(*words):
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    return done


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A toy BERT, and MNLI's files; a thirteenth example of one set fills no micro-batch."""
    folder = tmp_path_factory.mktemp("task")
    write_bert(folder)
    rows = entailment_rows()
    write_mnli(folder / "train.tsv", rows[:18])
    write_mnli(folder / "dev_matched.tsv", rows[:13])
    write_mnli(folder / "dev_mismatched.tsv", rows[13:20])
    write_mnli(folder / "test.tsv", rows[:3], labelled=False)
    return folder


def mnli(files, run, *more, epochs=2):
    return [
        *("mnli", "--load-dir", files / "bert", "--train-data", files / "train.tsv", "--save-dir", run),
        *("--valid-data", files / "dev_matched.tsv", files / "dev_mismatched.tsv", "--epochs", epochs),
        *("--micro-batch-size", 4, "--global-batch-size", 8, "--lr", 1e-2, *QUICK, *more),
    ]


def evaluations(run):
    return [line for line in metrics(run) if "valid_loss" in line]


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    run = tmp_path_factory.mktemp("trained") / "run"
    done = mt_task(*mnli(files, run, "--test-data", files / "test.tsv"))
    assert done.exit_code == 0, done.output
    return run, done.output


def test_each_epoch_evaluates_every_file_apart_and_all_together(files, trained):
    run, output = trained
    assert "drawn from the seed: task_head" in output
    assert "left out of the checkpoint: binary_head, head, lm_head" in output
    lines = evaluations(run)
    assert [line["step"] for line in lines] == [2, 4]  # 18 examples: two batches of 8
    for line in lines:
        right = [line["valid_dev_matched_accuracy"] * 13, line["valid_dev_mismatched_accuracy"] * 7]
        assert [abs(number - round(number)) < 1e-6 for number in right] == [True, True]
        assert line["valid_accuracy"] == pytest.approx(sum(right) / 20)
        loss = line["valid_dev_matched_loss"] * 13 + line["valid_dev_mismatched_loss"] * 7
        assert line["valid_loss"] == pytest.approx(loss / 20)
    assert [path.name for path in steps(run)] == ["step-00000002", "step-00000004"]


def test_predictions_are_those_of_the_last_evaluation(files, trained):
    run, output = trained
    sets = {
        name: read_predictions(run / "predictions" / f"{name}.jsonl")
        for name in ("dev_matched", "dev_mismatched", "test")
    }
    last = evaluations(run)[-1]
    for name, size in (("dev_matched", 13), ("dev_mismatched", 7)):
        right = sum(each.prediction == each.label for each in sets[name])
        assert len(sets[name]) == size
        assert right == round(last[f"valid_{name}_accuracy"] * size)
        assert f"{right} of {size} right, accuracy {right / size:.4f}" in output
        loss = -sum(torch.tensor(each.scores[each.label]).log().item() for each in sets[name]) / size
        assert loss == pytest.approx(last[f"valid_{name}_loss"], abs=1e-5)
    assert [each.label for each in sets["test"]] == [None] * 3
    for ours, theirs in zip(sets["test"], sets["dev_matched"], strict=False):
        assert ours.scores == pytest.approx(dict(theirs.scores), abs=1e-6)
    summary = json.loads((run / "predictions" / "summary.json").read_text())
    assert summary.keys() == {"dev_matched", "dev_mismatched", "test", "all"}
    assert summary["test"] == {"correct": 0, "labelled": 0}
    assert summary["all"]["labelled"] == 20
    line = json.loads((run / "predictions" / "test.jsonl").read_text().splitlines()[0])
    assert line.keys() == {"uid", "label", "prediction", "scores"}
    assert line["scores"].keys() == {"contradiction", "entailment", "neutral"}


def test_more_epochs_go_on_as_if_they_had_been_asked_for_at_first(files, trained, tmp_path):
    constant = ["--set", "lr_schedule.decay=constant", "--lr-warmup-fraction", 0]
    assert mt_task(*mnli(files, tmp_path / "two", *constant, epochs=1)).exit_code == 0
    done = mt_task(*mnli(files, tmp_path / "two", *constant, epochs=2))
    assert "resuming from" in done.output
    assert "drawn from the seed" not in done.output
    assert mt_task(*mnli(files, tmp_path / "one", *constant)).exit_code == 0
    last = [dict(Checkpoint.open(tmp_path / name).loader.tensors()) for name in ("one", "two")]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


def test_two_data_ranks_evaluate_and_train_as_one(files, trained, tmp_path):
    run = tmp_path / "run"
    done = mt_task(*mnli(files, run, "--nproc", 2, "--set", "parallel.sharding=zero1"))
    assert done.exit_code == 0, done.output
    for ours, theirs in zip(evaluations(run), evaluations(trained[0]), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.fixture(scope="module")
def questions(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    animals, places = ("cat", "fox", "owl"), ("wood", "barn")
    train = write_race(folder / "train", *[passage(animal, place) for animal in animals for place in places])
    return train, write_race(folder / "dev", passage("cat", "tree"))


def test_race_compares_four_choices_from_a_megatron_checkpoint(files, questions, tmp_path):
    from mt_ckpt.conversion.convert import convert

    write_bert(
        tmp_path, vocab_size=128, mlp={"kind": "dense", "ffn_hidden_size": 32, "activation": "gelu", "bias": True}
    )
    convert("native", tmp_path / "bert", "legacy", tmp_path / "old")
    train, dev = questions
    run = tmp_path / "run"
    words = [
        *("race", "--load-dir", tmp_path / "old", "--train-data", train, "--valid-data", dev, "--save-dir", run),
        *("--epochs", 1, "--micro-batch-size", 2, "--global-batch-size", 4, "--max-qa-length", 12, *QUICK),
        *("--tokenizer-type", "BertWordPieceLowerCase", "--vocab-file", tmp_path / "vocab.txt"),
    ]
    done = mt_task(*words)
    assert done.exit_code == 0, done.output
    predictions = read_predictions(run / "predictions" / "dev.jsonl")
    assert [(each.uid, each.label, [*each.scores]) for each in predictions] == [
        ("1-1-1", "B", ["A", "B", "C", "D"]),
        ("1-1-2", "D", ["A", "B", "C", "D"]),
    ]
    assert sum(predictions[0].scores.values()) == pytest.approx(1)
    assert evaluations(run)[0]["valid_accuracy"] in (0, 0.5, 1)


def test_an_ensemble_averages_probabilities_of_the_same_examples(tmp_path):
    scores = [[{"0": 0.9, "1": 0.1}, {"0": 0.4, "1": 0.6}], [{"0": 0.2, "1": 0.8}, {"0": 0.1, "1": 0.9}]]
    for number, each in enumerate(scores):
        rows = [Prediction(str(n), "1", score) for n, score in enumerate(each)]
        for name in ("dev", "test"):
            write_predictions(tmp_path / f"run-{number}" / "predictions" / f"{name}.jsonl", rows)
    done = mt_task("ensemble", tmp_path / "run-0", tmp_path / "run-1", "--save-dir", tmp_path / "both")
    assert done.exit_code == 0
    assert done.output.startswith("dev   1 of 2 right, accuracy 0.5000 ± 0.5000, f1 0.6667 ± 0.5000, matthews")
    assert done.output.splitlines()[-1].startswith("all   2 of 4 right, accuracy 0.5000 ± 0.2887, f1 0.6667")
    summary = json.loads((tmp_path / "both" / "summary.json").read_text())
    assert summary["all"] == {
        "correct": 2,
        "labelled": 4,
        "accuracy": 0.5,
        "accuracy_stderr": pytest.approx(statistics.stdev([0, 1, 0, 1]) / 2),
        "f1": pytest.approx(2 / 3),
        "f1_stderr": pytest.approx(statistics.pstdev([0.5, 0.5, 0.8, 0.8]) * 3**0.5),
        "matthews_correlation": 0.0,
        "matthews_correlation_stderr": 0.0,
    }
    first, second = read_predictions(tmp_path / "both" / "dev.jsonl")
    assert (first.scores, first.prediction) == ({"0": pytest.approx(0.55), "1": pytest.approx(0.45)}, "0")
    assert (second.scores, second.prediction) == ({"0": pytest.approx(0.25), "1": pytest.approx(0.75)}, "1")
    one, other = (tmp_path / f"run-{n}" / "predictions" / "dev.jsonl" for n in (0, 1))
    write_predictions(other, [Prediction("7", "0", {"0": 1.0, "1": 0.0}), Prediction("1", "1", {"a": 1.0, "1": 0.0})])
    with pytest.raises(MtError) as error:
        mt_task("ensemble", one, other, "--save-dir", tmp_path / "new")
    assert [str(problem) for problem in error.value.problems] == [
        f"{other}:1: uid '7', not '0'; those of {one}, in the same order",
        f"{other}:1: label '0', not '1'; those of {one}, in the same order",
        f"{other}:2: classes a, 1; 0, 1",
    ]
    write_predictions(other, [Prediction("0", "1", {"0": 1.0, "1": 0.0})])
    with pytest.raises(MtError, match=r"1 examples, .* has 2; those of"):
        mt_task("ensemble", one, other, "--save-dir", tmp_path / "new")
    other.write_text('{"uid": 1}\n')
    with pytest.raises(
        MtError, match=r"dev.jsonl:1: is no prediction \('scores'\); an object with uid, label and scores"
    ):
        mt_task("ensemble", one, other, "--save-dir", tmp_path / "new")
    other.unlink()
    with pytest.raises(MtError, match="run-1: has predictions of test; those of dev, test, as"):
        mt_task("ensemble", tmp_path / "run-0", tmp_path / "run-1", "--save-dir", tmp_path / "new")
    with pytest.raises(MtError, match="mt task ensemble: 1 runs; two or more"):
        mt_task("ensemble", one, "--save-dir", tmp_path / "new")
    (tmp_path / "bare").mkdir()
    with pytest.raises(MtError, match="bare: holds no predictions; a run of mt task that has ended"):
        mt_task("ensemble", one, tmp_path / "bare", "--save-dir", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@contextmanager
def files_no_larger_than(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_no_half_of_the_predictions(tmp_path):
    path = tmp_path / "predictions" / "dev.jsonl"
    rows = [Prediction(str(n), None, {"0": 0.5, "1": 0.5}) for n in range(200)]
    write_predictions(path, rows[:1])
    before = path.read_bytes()
    with files_no_larger_than(2_000), pytest.raises(MtError, match="dev.jsonl: the disk is full; free some space"):
        write_predictions(path, rows)
    assert path.read_bytes() == before
    assert [*path.parent.iterdir()] == [path]


def refused(files, tmp_path, *more):
    with pytest.raises(MtError) as error:
        mt_task(*mnli(files, tmp_path / "run", *more))
    return str(error.value)


def test_what_cannot_be_fine_tuned_is_refused(files, tmp_path, monkeypatch):
    assert "18 examples fill no batch of 19; --global-batch-size of at most 18" in refused(
        files, tmp_path, "--global-batch-size", 19
    )
    assert "data.seq_length: 64 is longer than the model's positions" in refused(files, tmp_path, "--seq-length", 64)
    bad = write_tsv(tmp_path / "bad.tsv", ("index", "sentence1", "sentence2"), ("0", "a", "b"))
    assert "bad.tsv:1: has no column 'gold_label'" in refused(files, tmp_path, "--valid-data", bad)
    head = ["--set", "model.task_head.classes=2"]
    assert "samples of data.kind = 'glue' need {'kind': 'classification', 'classes': 3}" in refused(
        files, tmp_path, *head
    )
    with pytest.raises(MtError, match="--task-name: unknown task 'rtee'; did you mean 'rte'"):
        mt_task("glue", "--task-name", "rtee", *mnli(files, tmp_path / "run")[1:])
    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert "mt task mnli: is started as a rank; start once, with --nproc" in refused(files, tmp_path)


def test_bad_rows_are_left_out_if_asked_for(files, tmp_path):
    rows = entailment_rows()[:9]
    path = write_mnli(tmp_path / "train.tsv", [*rows, ("a", "b", "-")])
    done = mt_task(*mnli(files, tmp_path / "run", "--train-data", path, "--skip-bad-rows", epochs=1))
    assert done.exit_code == 0, done.output
    allowed = "allowed: contradiction, entailment, neutral"
    assert f"left out 1 examples, the first of them: {path}:11: label '-'; {allowed}" in done.output
