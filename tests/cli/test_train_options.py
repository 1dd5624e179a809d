"""`mt train`: batches that grow, documents kept apart, orders of the samples, determinism, and a change of layout."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mt_cli.run_config import load_run_config
from mt_cli.train.compose import run
from mt_core.checkpoint import native
from mt_data.indexed.writer import IndexedWriter
from tiny import byte_corpus, metrics, run_toml

pytestmark = pytest.mark.slow

MT = [sys.executable, "-m", "mt_cli"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return byte_corpus(tmp_path_factory.mktemp("corpus") / "bytes_text_document")


@pytest.fixture
def train(tmp_path, corpus):
    """Logged numbers of a run in this process, by the name of its directory; again with the same name resumes it."""

    def here(name: str, *overrides: str) -> list[dict]:
        toml = run_toml(tmp_path / "run.toml", corpus, tmp_path / name, precision={"dtype": "fp64"})
        assert run(load_run_config([toml], overrides)) == 0
        return metrics(tmp_path / name)

    return here


@pytest.fixture
def launch(tmp_path, corpus):
    """Run `mt train` on two ranks with these overrides."""

    def there(name: str, *overrides: str) -> Path:
        toml = run_toml(tmp_path / "run.toml", corpus, tmp_path / name, precision={"dtype": "fp64"})
        options = [part for text in overrides for part in ("--set", text)]
        subprocess.run([*MT, "train", str(toml), "--nproc", "2", *options], check=True, timeout=120)
        return tmp_path / name

    return there


@pytest.mark.parametrize("option", ['batch.sizes="0:4 8:8 24:16"', "batch.rampup=[4, 4, 16]"])
def test_a_growing_batch_takes_the_samples_in_the_same_order_and_survives_a_resume(train, option):
    common = ["batch.global_batch=16", option, "train.steps=6"]
    lines = train("whole", *common)
    expected = [4, 8, 16, 24, 40, 56] if "sizes" in option else [4, 8, 16, 32, 48, 64]
    assert [line["samples"] for line in lines] == expected
    train("cut", *common, "train.steps=3", "lr_schedule.decay_steps=6")
    resumed = train("cut", *common, "lr_schedule.decay_steps=6")
    assert resumed == lines


def test_growing_batches_of_two_ranks_are_those_of_one(train, launch):
    options = ['batch.sizes="0:4 8:8"', "batch.micro_batch=1"]
    one, two = train("one", *options), metrics(launch("two", *options))
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-12)


def test_documents_that_do_not_see_each_other_change_the_loss_and_two_ways_to_say_so_agree(train, tmp_path):
    with IndexedWriter(tmp_path / "lines", np.dtype("uint16")) as writer:
        for line in Path(__file__).read_bytes().splitlines():
            ids = np.append(np.frombuffer(line[:40], np.uint8).astype(np.uint16), 256)
            writer.add_document(ids, np.array([len(ids)]))
    lines = f"data.paths=['{tmp_path / 'lines'}']"
    plain = train("plain", lines)
    bounds = train("bounds", lines, "data.inter_document_masking=true")
    mask = train("mask", lines, "data.reset_attention_mask=true", "data.reset_position_ids=true")
    assert mask == bounds
    assert abs(plain[-1]["loss"] - bounds[-1]["loss"]) > 1e-6


def test_the_cyclic_order_goes_on_past_the_end_of_the_data(train):
    lines = train("cyclic", "data.order=cyclic", "train.steps=8")
    assert len(lines) == 8
    assert lines != train("single", "train.steps=8")


def files(run_dir: Path) -> dict[str, str]:
    step = native.resolve(run_dir)
    state_files = [file for part in ("model", "optim") for file in sorted((step / part).iterdir())]
    return {str(file.relative_to(step)): hashlib.sha256(file.read_bytes()).hexdigest() for file in state_files}


def test_two_deterministic_runs_write_the_same_bytes(launch):
    options = ["runtime.deterministic=true", "parallel.sharding=zero1", "precision.dtype=bf16"]
    one, two = launch("one", *options), launch("two", *options)
    assert metrics(one) == metrics(two)
    assert files(one) == files(two)


def test_a_run_goes_on_under_another_layout(train, launch):
    whole = train("whole")
    run_dir = launch("moved", "train.steps=3", "lr_schedule.decay_steps=6", "parallel.sharding=fsdp")
    launch("moved", "parallel.tensor=2", "parallel.sequence=true")
    for a, b in zip(whole, metrics(run_dir), strict=True):
        assert b == pytest.approx(a, rel=1e-9)


def test_without_a_checkpoint_at_the_end_there_is_none(train, tmp_path):
    train("none", "checkpoint.at_end=false")
    assert native.steps(tmp_path / "none") == []
