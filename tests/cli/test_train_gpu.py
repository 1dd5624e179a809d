"""Training on a GPU: agrees with the CPU, in bf16 within its rounding, and resumes bit for bit."""

import subprocess
import sys

import pytest
import torch

from mt_cli.run_config import load_run_config
from mt_cli.train.compose import run
from mt_core.checkpoint import native
from mt_core.pipeline.schedule_table import SCHEDULES
from tiny import byte_corpus, metrics, run_toml

pytestmark = pytest.mark.gpu


@pytest.fixture
def losses(tmp_path):
    """Losses of the tiny byte model's run with some overrides."""
    corpus = byte_corpus(tmp_path / "bytes_text_document")

    def train(name: str, *overrides: str) -> list[dict]:
        toml = run_toml(tmp_path / "run.toml", corpus, tmp_path / name)
        assert run(load_run_config([toml], overrides)) == 0
        return metrics(tmp_path / name)

    return train


def test_fp32_on_the_gpu_agrees_with_the_cpu(losses):
    cpu, gpu = losses("cpu", "runtime.device=cpu"), losses("gpu", "runtime.device=cuda")
    for a, b in zip(cpu, gpu, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def test_bf16_on_the_gpu_stays_within_its_rounding(losses):
    exact, rounded = losses("fp64", "precision.dtype=fp64"), losses("bf16", "precision.dtype=bf16")
    for a, b in zip(exact, rounded, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2**-7)


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path, losses):
    whole = losses("whole", "precision.dtype=bf16", "checkpoint.every=3")
    losses("cut", "precision.dtype=bf16", "checkpoint.every=3")
    (native.step_directory(tmp_path / "cut", 6) / native.COMMITTED).unlink()
    assert losses("cut", "precision.dtype=bf16", "checkpoint.every=3") == whole


def test_compiled_parts_change_the_loss_by_rounding_only(losses):
    bf16 = "precision.dtype=bf16"
    plain, compiled = losses("plain", bf16), losses("fast", bf16, "runtime.compile=true")
    for a, b in zip(plain, compiled, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2**-8)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_two_deterministic_runs_are_bit_equal(tmp_path, dtype):
    toml = run_toml(tmp_path / "run.toml", byte_corpus(tmp_path / "bytes_text_document"), tmp_path / "unused")
    for name in ("one", "two"):  # each in a process of its own: CUDA reads some settings once
        words = [f"precision.dtype={dtype}", "runtime.deterministic=true", f"runtime.run_dir={tmp_path / name}"]
        command = [sys.executable, "-m", "mt_cli", "train", str(toml), *(w for word in words for w in ("--set", word))]
        subprocess.run(command, check=True)
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")
    for part in ("model", "optim"):
        one, two = (dict(native.stream(native.step_directory(tmp_path / name, 6), part)) for name in ("one", "two"))
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("schedule", [*SCHEDULES])
def test_stages_on_two_gpus_agree_with_one_cpu_rank(tmp_path, losses, schedule):
    fp64 = ("precision.dtype=fp64", "model.layers=4", "batch.micro_batch=1")
    one = losses("one", "runtime.device=cpu", *fp64)
    toml = run_toml(tmp_path / "run.toml", byte_corpus(tmp_path / "bytes_text_document"), tmp_path / "stages")
    words = (*fp64, "parallel.pipeline=2", f"pipeline.schedule={schedule}")
    options = [word for setting in words for word in ("--set", setting)]
    subprocess.run([sys.executable, "-m", "mt_cli", "train", str(toml), "--nproc", "2", *options], check=True)
    for a, b in zip(one, metrics(tmp_path / "stages"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-12)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-12)
