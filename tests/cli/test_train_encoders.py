"""`mt train` with BERT and T5 on samples of masked words: losses fall, on one rank and equally on two."""

import json
import shutil

import numpy as np
import pytest
import tomli_w
from typer.testing import CliRunner

from models.encoders import bert, t5
from mt_cli.run_config import load_run_config
from mt_cli.train.compose import run
from mt_cli.verify.check import check
from mt_cli.verify.layouts import cases, with_parallel
from mt_cli.verify.shrink import shrink
from mt_core.errors import MtError
from mt_core.parallel.layout import build_layout
from mt_eval.tasks.command import app
from tiny import metrics
from word_pieces import toy_corpus, toy_tokenizer

pytestmark = pytest.mark.slow

RATES = {"attention": 0.1, "hidden": 0.1, "embedding": 0.1}
MODELS = {
    "bert": bert(layers=1, vocab_size=32, dropout=RATES),
    "t5": t5(layers=1, decoder_layers=1, vocab_size=32, dropout=RATES),
}


def documents():
    """Sentences whose words follow from one another, so that there is something to learn."""
    random = np.random.RandomState(3)
    for _ in range(60):
        starts = random.randint(5, 20, random.randint(3, 6))
        yield [[int(5 + (start - 5 + n) % 15) for n in range(random.randint(3, 6))] for start in starts]


def run_file(folder, model):
    data = {
        "kind": model.kind,
        "paths": [toy_corpus(folder, list(documents()))],
        "seq_length": 40,
        "split": "80,20,0",
        "tokenizer": toy_tokenizer(folder).model_dump(mode="json", exclude_none=True),
    }
    if model.kind == "t5":
        data["decoder_seq_length"] = 24
    values = {
        "model": model.model_dump(mode="json", exclude_none=True),
        "data": data,
        "batch": {"micro_batch": 4, "global_batch": 16},
        "train": {"steps": 24, "eval_every": 12, "eval_batches": 1},
        "lr_schedule": {"warmup_steps": 2},
        "optim": {"lr": 1e-2},
        "precision": {"dtype": "fp64"},
        "log": {"every": 4},
        "runtime": {"run_dir": str(folder / "run"), "threads": 1},
    }
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps(values))
    return path


@pytest.mark.parametrize("kind", MODELS)
def test_losses_fall_and_are_those_of_two_ranks(kind, mt, tmp_path):
    file = run_file(tmp_path, MODELS[kind])
    assert run(load_run_config([file], [f"runtime.run_dir={tmp_path / 'one'}"])) == 0
    ran = mt("train", file, "--nproc", 2)
    assert ran.returncode == 0, ran.stderr
    alone, together = metrics(tmp_path / "one"), metrics(tmp_path / "run")
    losses = [line["loss"] for line in alone if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    assert sum("valid_loss" in line for line in alone) == 2
    for a, b in zip(alone, together, strict=True):
        assert b == pytest.approx(a, rel=1e-10)
    for line in alone:
        check_parts_of_the_loss(kind, line)
    check_evaluation(kind, tmp_path, alone)


def check_evaluation(kind, folder, lines):
    """`mt eval` of the last step gives what the run's last evaluation gave, which was after it, in fp32."""
    task, output = "masked-lm" if kind == "bert" else "span", folder / "result.json"
    words = ["--load-dir", folder / "one", "--data", folder / "toy", "--split", "80,20,0", "--samples", 16]
    words += ["--output", output, "--device", "cpu", "--batch-size", 3]
    ran = CliRunner().invoke(app, [task, *map(str, words)], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    report = json.loads(output.read_text())
    valid = {name.removeprefix("valid_"): value for name, value in lines[-1].items() if name.startswith("valid_")}
    errors = {name: report["metrics"].pop(f"{name}_stderr") for name in valid}
    assert all(0 < error < 1 for error in errors.values())
    assert report["metrics"] == pytest.approx(valid, rel=2e-5)
    assert len(output.with_name(f"result.{task}.jsonl").read_text().splitlines()) == 16
    assert (report["task"], report["counts"]) == (task, {"samples": 16})
    assert report["settings"]["seed"] == 1234
    assert ran.output.startswith(f"{task}\n")


def check_parts_of_the_loss(kind, line):
    """They are logged beside it, of training and of evaluations, and add up to it."""
    for prefix in ("", "valid_") if "loss" in line or "valid_loss" in line else ():
        if f"{prefix}loss" not in line:
            continue
        names = ["masked_lm_loss", "sentence_order_loss"] if kind == "bert" else ["span_loss"]
        assert line[f"{prefix}loss"] == pytest.approx(sum(line[f"{prefix}{name}"] for name in names), rel=1e-12)
        if kind == "bert":
            accuracy = line[f"{prefix}sentence_order_accuracy"]
            assert 0 <= accuracy <= 1
            assert accuracy * 16 == pytest.approx(round(accuracy * 16)), "of the 16 samples of a batch"


def test_a_resumed_run_drops_what_the_unbroken_one_dropped(tmp_path):
    config = load_run_config([run_file(tmp_path, MODELS["bert"])], ["checkpoint.every=12", "train.eval_every=0"])
    assert run(config) == 0
    unbroken = metrics(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step-00000024")
    assert run(config) == 0
    assert [line["step"] for line in unbroken if line["step"] > 12]
    assert metrics(tmp_path / "run") == unbroken


NO_ORDER = ["model.pooler=false", "model.binary_head=false"]
NO_LANGUAGE_HEADS = ["model.lm_head=false", "model.binary_head=false"]


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        (
            "bert",
            ["data.classification_head=false"],
            "data.classification_head: is false, but model.binary_head",
        ),
        ("bert", ["model.token_types=1"], "model.token_types: 1, but samples of two parts have tokens of two types"),
        ("bert", ["model.lm_head=false"], "model.lm_head: false: without it there is nothing to train on"),
        ("bert", ["model.binary_head=false"], "model.pooler: true, but without model.binary_head no loss reaches it"),
        ("bert", ["parallel.context=2"], "parallel.context: 2, but not all attention of model.kind = 'bert' is causal"),
        (
            "bert",
            [*NO_LANGUAGE_HEADS, "model.task_head.kind=multiple_choice"],
            "model.task_head: is there, but samples of data.kind = 'bert' have no label for a whole text",
        ),
        (
            "bert",
            ["model.task_head.kind=classification", "model.task_head.classes=3"],
            "task_head needs pooler, and stands instead of lm_head and binary_head: turn them off",
        ),
        ("t5", ["parallel.context=2"], "parallel.context: 2, but not all attention of model.kind = 't5' is causal"),
        ("t5", ["data.decoder_seq_length=50"], "data.decoder_seq_length: 50 is longer than the model's positions"),
        (
            "t5",
            ["parallel.tensor=2", "parallel.sequence=true", "data.decoder_seq_length=23"],
            "data.decoder_seq_length: 23 is no multiple of parallel.tensor 2, as parallel.sequence needs",
        ),
        (
            "t5",
            ["data.kind=mock", "data.seq_length=40"],
            "data.kind: 'mock' samples are not for a model of kind 't5'; allowed: t5",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(kind, overrides, message, tmp_path):
    with pytest.raises(MtError) as error:
        load_run_config([run_file(tmp_path, MODELS[kind])], overrides)
    assert message in str(error.value)


def test_an_encoder_without_order_can_share_its_sequences(tmp_path):
    sequence = ["parallel.tensor=2", "parallel.sequence=true"]
    config = load_run_config([run_file(tmp_path, MODELS["bert"])], [*NO_ORDER, *sequence])
    assert config.parallel.sequence


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "--gpus", 8], "mt: model.kind: 'bert': the arithmetic of this model is not known; allowed: gpt"),
        (
            ["verify", "--layout", "context=2"],
            "mt: parallel.context: 2, but not all attention of model.kind = 'bert'",
        ),
        (
            ["verify", "--layout", "tensor=2", "--documents"],
            "mt: --documents: sequences of a model of kind 'bert' are not cut into documents; leave it out",
        ),
    ],
)
def test_commands_that_know_only_gpt_say_so(words, message, mt):
    ran = mt(words[0], "--preset", "bert-345m", *words[1:])
    assert (ran.returncode, ran.stderr.startswith(message)) == (2, True), ran.stderr


@pytest.mark.parametrize("preset", ["bert-345m", "t5-220m"])
def test_a_layout_of_a_preset_computes_what_one_rank_does(preset):
    config = load_run_config([], ["batch.micro_batch=1"], preset, rules=False)
    chosen = cases(config, ["tensor=2"], None)
    small = shrink(config, [build_layout(with_parallel(config, case.parallel)) for case in chosen])
    assert small.model.parameter_count < 100_000
    precision = small.precision.model_copy(update={"dtype": "fp64"})
    small = small.model_copy(update={"precision": precision})
    (outcome,) = check(small, chosen, steps=2, documents=False)
    assert outcome.agrees
