"""Going on with a run that was changed: its samples, what is said and refused, and what stays on the disk."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mt_cli.run_config import load_run_config
from mt_cli.train import command, compose, resume
from mt_cli.train.run_lock import LOCK
from mt_core.checkpoint import native
from mt_core.errors import MtError
from mt_data.batching.samplers import DataParallelRank, cyclic
from mt_data.config import GPTData
from mt_data.datasets.gpt.dataset import build_splits
from mt_data.indexed.writer import IndexedWriter
from tiny import metrics, run_toml

EPOCH = 30
"""Samples in an epoch of the corpus."""
COMMON = ["lr_schedule.warmup_steps=0", "lr_schedule.decay=constant", "data.split=1,0,0"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Ten documents, 30 samples of 32 tokens."""
    prefix, random = tmp_path_factory.mktemp("corpus") / "text_document", np.random.default_rng(1)
    with IndexedWriter(prefix, np.dtype("uint16")) as writer:
        for length in [96] * 9 + [97]:
            writer.add_document(random.integers(0, 256, length).astype(np.uint16), np.array([length]))
    return prefix


@pytest.fixture
def read(monkeypatch) -> list[list[int]]:
    """The tokens of every training sample that the runs of this test take."""
    samples, load_batches = [], compose.load_batches

    def recording(*args: Any, **options: Any) -> Iterator[Any]:
        for batch in load_batches(*args, **options):
            samples.extend(batch["tokens"].tolist())
            yield batch

    monkeypatch.setattr(compose, "load_batches", recording)
    return samples


Train = Callable[..., Path]


@pytest.fixture
def train(tmp_path, corpus) -> Train:
    """Train in this process in the run directory of a name, six steps of four samples unless told otherwise."""

    def here(*overrides: str, name: str = "run", allow_change: bool = False) -> Path:
        toml = run_toml(tmp_path / "run.toml", corpus, tmp_path / name)
        config = load_run_config([toml], [*COMMON, *overrides])
        assert compose.run(config, allow_change=allow_change) == 0
        return tmp_path / name

    return here


def planned(corpus: Path, tmp_path: Path, samples: int) -> list[list[int]]:
    """The samples of a plan, in their order."""
    config = GPTData(paths=(str(corpus),), split="1", seq_length=32)
    dataset = build_splits(config, samples=(samples, 0, 0), seed=1234, cache_dir=tmp_path / "cache").train
    assert dataset is not None
    return [np.asarray(dataset[i]["tokens"]).tolist() for i in range(len(dataset))]


def meta(run_dir: Path) -> dict[str, Any]:
    return native.read_meta(native.resolve(run_dir))


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "change", [["batch.global_batch=2", "train.steps=16"], ["train.steps=11"]], ids=["smaller batch", "more steps"]
)
def test_samples_beyond_the_epoch_follow_those_that_were_planned(train, read, corpus, tmp_path, change):
    run_dir = train()
    train(*change)
    assert len(read) == meta(run_dir)["samples"] == 44
    epoch = planned(corpus, tmp_path, 24)
    assert read[:EPOCH] == epoch
    assert len({tuple(sample) for sample in epoch}) == EPOCH, "nothing is read twice in an epoch"
    assert meta(run_dir)["planned_samples"] == [24, 44]
    assert [line["samples"] for line in metrics(run_dir)][-1] == 44


def test_a_run_whose_plan_grew_resumes_bit_for_bit(train, read):
    longer = ["train.steps=12", "checkpoint.every=9"]
    run_dir = train()
    train(*longer)
    whole = dict(native.stream(native.step_directory(run_dir, 12)))
    (native.step_directory(run_dir, 12) / native.COMMITTED).unlink()
    first, read[:] = read[36:], []
    train(*longer)
    assert read == first, "the samples after step 9"
    again = dict(native.stream(native.step_directory(run_dir, 12)))
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    assert meta(run_dir)["planned_samples"] == [24, 48]


def test_a_rate_counted_in_samples_follows_them_after_a_resume_with_another_batch(train):
    rate = ["lr_schedule.decay=linear", "lr_schedule.decay_samples=60", "lr_schedule.warmup_samples=6", "log.every=1"]
    train(*rate)
    run_dir = train(*rate, "batch.global_batch=2", "train.steps=16")
    lines = [line for line in metrics(run_dir) if "loss" in line]
    before = [0, *(line["samples"] for line in lines)][:-1]
    assert before == [*range(0, 24, 4), *range(24, 44, 2)]
    peak = meta(run_dir)["config"]["optim"]["lr"]
    expected = [peak * (count / 6 if count <= 6 else (60 - count) / 54) for count in before]
    assert [line["lr"] for line in lines] == pytest.approx(expected, rel=1e-14)


def test_a_checkpoint_without_a_plan_goes_on_with_that_of_its_configuration(train, read, corpus, tmp_path):
    run_dir = train()
    file = native.resolve(run_dir) / "meta.json"
    document = json.loads(file.read_text())
    del document["planned_samples"], document["data_ranks"]
    file.write_text(json.dumps(document))
    train("train.steps=11")
    assert read[:EPOCH] == planned(corpus, tmp_path, 24)
    assert meta(run_dir)["planned_samples"] == [24, 44]


def test_fewer_steps_keep_the_plan(train, read, corpus, tmp_path):
    run_dir = train("train.steps=10", "checkpoint.every=2")
    for step in (10, 8, 6):
        (native.step_directory(run_dir, step) / native.COMMITTED).unlink()
    del read[:]
    train("train.steps=6")
    assert read == planned(corpus, tmp_path, 40)[16:24]


def test_a_cyclic_order_stays_that_of_its_first_dataset(train, read, corpus, tmp_path):
    run_dir = train("data.order=cyclic")
    train("data.order=cyclic", "train.steps=14")
    samples = planned(corpus, tmp_path, 24)
    order = cyclic(len(samples), 0, DataParallelRank(micro_batch=2))
    assert read == [samples[i] for micro_batch in islice(order, 28) for i in micro_batch]
    assert meta(run_dir)["planned_samples"] == [24]


def test_what_changed_is_said_and_each_configuration_is_kept(train, capsys):
    run_dir = train()
    first = (run_dir / "config.toml").read_bytes()
    capsys.readouterr()
    train("train.steps=7", "optim.lr=0.5", "precision.loss_scale=8", "log.every=7")
    lines = capsys.readouterr().err.splitlines()
    assert lines[:5] == [
        f"mt: resuming from {run_dir / 'step-00000006'}",
        "mt: changed since then: log.every: 1 → 7",
        "mt: changed since then: optim.lr: 0.01 → 0.5",
        "mt: changed since then: precision.loss_scale: unset → 8.0",
        "mt: changed since then: train.steps: 6 → 7",
    ]
    assert (run_dir / "config.toml").read_bytes() == first
    assert load_run_config([run_dir / "config-00000006.toml"]).optim.lr == 0.5
    train("train.steps=8", "optim.lr=0.5", "precision.loss_scale=8", "log.every=7")
    assert [path.name for path in sorted(run_dir.glob("config*"))] == [
        *("config-00000006.toml", "config-00000007.toml", "config.toml")
    ]
    assert load_run_config([run_dir / "config-00000007.toml"]).train.steps == 8


def test_an_unchanged_configuration_is_not_written_again_and_two_of_one_step_are_both_kept(train, capsys):
    run_dir = train("checkpoint.every=3")
    last = native.step_directory(run_dir, 6) / native.COMMITTED
    for lr in (None, 0.5, 0.25, 0.25):
        last.unlink()
        capsys.readouterr()
        train("checkpoint.every=3", *([f"optim.lr={lr}"] if lr else []))
        assert ("changed since then" in capsys.readouterr().err) == (lr is not None)
    configs = [path.name for path in sorted(run_dir.glob("config*"))]
    assert configs == ["config-00000003-2.toml", "config-00000003.toml", "config.toml"]
    rates = [load_run_config([run_dir / name]).optim.lr for name in configs]
    assert rates == [0.25, 0.5, 0.01]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data.seq_length=16", "data.seq_length: 32 → 16 gives the samples another order or other text"),
        ("data.split=8,2,0", 'data.split: "1,0,0" → "8,2,0" gives'),
        ("data.order=cyclic", 'data.order: "single" → "cyclic" gives'),
        ("runtime.seed=7", "runtime.seed: 1234 → 7 gives"),
    ],
)
def test_what_would_repeat_or_skip_samples_is_refused_unless_it_is_allowed(train, read, change, said):
    run_dir = train()
    before, listed = read[:], names(run_dir)
    with pytest.raises(MtError) as refusal:
        train(change, "train.steps=8")
    assert said in str(refusal.value)
    assert str(refusal.value).endswith(
        ": some would be repeated, others skipped; keep it, choose another runtime.run_dir, or go on at sample 24 of "
        "the new order with --allow-change"
    )
    assert names(run_dir) == listed, "a refused start leaves everything as it was"
    train(change, "train.steps=8", allow_change=True)
    assert len(read) == len(before) + 8
    assert meta(run_dir)["planned_samples"] == [32]
    train(change, "train.steps=9")
    assert meta(run_dir)["samples"] == 36


def test_all_refusals_are_told_at_once(train):
    train()
    with pytest.raises(MtError) as refusal:
        train("data.seq_length=16", "runtime.seed=7", "model.layers=3", "train.steps=8")
    assert [problem.where for problem in refusal.value.problems] == ["data.seq_length", "model.layers", "runtime.seed"]


def test_a_cyclic_order_is_refused_another_micro_batch(train):
    train("data.order=cyclic")
    with pytest.raises(MtError, match="batch.micro_batch: 2 → 4 gives the samples another order"):
        train("data.order=cyclic", "batch.micro_batch=4", "train.steps=8")


def test_a_cyclic_order_is_refused_another_number_of_data_ranks(train, tmp_path):
    point = resume.find_resume_point(train("data.order=cyclic"))
    config = load_run_config([tmp_path / "run" / "config.toml"])
    (problem,) = resume.change_problems(point, config, 2, allow=False)
    assert str(problem).startswith("data-parallel ranks: 1 → 2 gives the samples another order or other text: some")
    assert not list(resume.change_problems(point, config, 2, allow=True))
    assert not list(resume.change_problems(point, config, 1, allow=False))


def test_data_of_another_package_is_not_asked_to_go_on_beyond_its_plan(train, tmp_path, monkeypatch):
    point = resume.find_resume_point(train())
    config = load_run_config([tmp_path / "run" / "config.toml"], ["train.steps=11"])
    monkeypatch.setattr(resume, "BUILTIN_SECTIONS", ())
    with pytest.raises(MtError) as refusal:
        resume.plan_samples(point, config, allow=False)
    assert str(refusal.value) == (
        "train.steps: wants 44 samples, planned were 24; mt cannot know whether their order stays for data of kind "
        "'gpt'; fewer, or --allow-change"
    )
    assert resume.plan_samples(point, config, allow=True) == (44,)


def test_settings_that_a_checkpoint_does_not_tell_are_no_changes(train, capsys):
    run_dir = train()
    file = native.resolve(run_dir) / "meta.json"
    document = json.loads(file.read_text())
    document["config"]["data"] = {"seq_length": 32}  # as one that was converted
    del document["config"]["optim"], document["config"]["model"]["tied"]
    file.write_text(json.dumps(document))
    train("train.steps=7")
    changed = [line for line in capsys.readouterr().err.splitlines() if "changed since then: " in line]
    assert "mt: changed since then: train.steps: 6 → 7" in changed
    assert not [line for line in changed if "model." in line or "optim." in line or "prefetch" in line]


@pytest.mark.parametrize("steps", [6, 4])
def test_a_complete_run_says_so_in_one_line_and_trains_nothing(train, capsys, steps):
    run_dir = train()
    before = {
        path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path.parent.name != "heartbeats"
    }
    capsys.readouterr()
    train(f"train.steps={steps}")
    reached = f"{run_dir / 'step-00000006'} has reached step 6, train.steps is {steps}"
    assert capsys.readouterr().err == f"mt: the run is complete: {reached}; raise it to train on\n"
    assert all(path.read_bytes() == content for path, content in before.items())


FAILURES = {
    "an empty split": ["train.eval_every=2"],
    "a small vocabulary": ["model.vocab_size=200"],
    "ranks that do not run": ["parallel.data=2"],
    "an unknown checkpoint": ["checkpoint.init=native:nowhere"],
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_start_leaves_nothing_behind(train, tmp_path, failure):
    with pytest.raises(MtError):
        train(*FAILURES[failure], name="new/deep")
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes.txt").write_text("mine")
    with pytest.raises(MtError):
        train(*FAILURES[failure], name="old")
    assert names(tmp_path / "old") == {"notes.txt"}


def test_a_start_that_fails_in_its_first_step_leaves_the_index_alone(train, tmp_path):
    (tmp_path / "run.toml").touch()
    with pytest.raises(MtError, match="hold token id"):
        train("data.tokenizer.type=NullTokenizer", "data.tokenizer.vocab_size=90", "model.vocab_size=100")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"index-cache"}


def test_a_failed_resume_leaves_the_run_as_it_was(train, tmp_path):
    run_dir = train()
    before = names(run_dir)
    with pytest.raises(MtError):
        train("train.steps=8", "train.eval_every=2")
    assert {name for name in names(run_dir) - before if not name.startswith("index-cache/")} == set()
    assert before <= names(run_dir)


@pytest.mark.slow
def test_a_second_run_in_the_directory_is_refused_while_the_first_lives(train, tmp_path, corpus):
    run_dir = tmp_path / "run"
    toml = run_toml(tmp_path / "run.toml", corpus, run_dir, train={"steps": 5000}, log={"every": 1})
    options = [part for text in COMMON for part in ("--set", text)]
    first = subprocess.Popen([sys.executable, "-m", "mt_cli", "train", str(toml), *options])
    try:
        end = time.monotonic() + 60
        while not (run_dir / "metrics.jsonl").exists() or not (run_dir / "metrics.jsonl").read_text():
            assert time.monotonic() < end
            time.sleep(0.01)
        in_use = f"is in use by another run: process {first.pid} on "
        with pytest.raises(MtError, match=in_use):
            train("train.steps=5000")
        with pytest.raises(MtError, match=in_use):
            command._launch([toml], COMMON, None, 2, 0, False)
    finally:
        first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 128 + signal.SIGTERM
    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == [*range(1, len(lines) + 1)]
    assert not (run_dir / LOCK).exists()
    train(f"train.steps={meta(run_dir)['step'] + 1}")
