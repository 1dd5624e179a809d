"""`mt train` from the hub, and a run that ends in Hugging Face format."""

import os
import subprocess
import sys

import pytest
import torch

from ckpt.hub.hub_server import serving
from mt_cli.run_config import load_run_config
from mt_cli.train.compose import run
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.errors import MtError
from tiny import byte_corpus, run_toml

ENDS = ["train.steps=1", "lr_schedule.warmup_steps=0", "checkpoint.save_format=hf"]


@pytest.fixture
def toml(tmp_path):
    corpus = byte_corpus(tmp_path / "bytes_text_document")
    return run_toml(tmp_path / "run.toml", corpus, tmp_path / "run")


def test_a_run_ends_in_hugging_face_format(toml, tmp_path, capsys):
    assert run(load_run_config([toml], ENDS)) == 0
    assert f"mt: in hf format it is in {tmp_path / 'run' / 'hf'}" in capsys.readouterr().err
    native, result = (open_checkpoint(path) for path in (tmp_path / "run", tmp_path / "run" / "hf"))
    assert result.config() == native.config()
    expected = dict(native.tensors())
    assert all(torch.equal(tensor, expected.pop(name)) for name, tensor in result.tensors())
    assert not expected


def test_a_longer_run_replaces_it(toml, tmp_path):
    for steps in (1, 2):
        assert run(load_run_config([toml], [*ENDS, f"train.steps={steps}"])) == 0
    native, result = (dict(open_checkpoint(path).tensors()) for path in (tmp_path / "run", tmp_path / "run" / "hf"))
    assert torch.equal(native["embed.weight"], result["embed.weight"])
    assert sorted(path.name for path in (tmp_path / "run").glob("*hf*")) == ["hf"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("checkpoint.at_end=false", "save_format: hf without at_end; it is made from the last step: set at_end = true"),
        ("model.attention.out_bias=true", "saver hf: .* cannot carry "),
    ],
)
def test_a_run_that_could_not_end_so_is_refused_before_it_starts(override, message, toml):
    with pytest.raises(MtError, match=message):
        load_run_config([toml], [*ENDS, override])


def test_it_needs_mt_ckpt(toml):
    options = [part for text in ENDS for part in ("--set", text)]
    command = [sys.executable, "-m", "mt_cli", "config", "check", str(toml), *options]
    without = os.environ | {"MT_DISABLE_PLUGINS": "mt-ckpt"}
    done = subprocess.run(command, env=without, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "checkpoint.save_format: needs mt-ckpt, which is not installed; pip install mt-ckpt" in done.stderr


def test_a_run_starts_from_the_hub(toml, tmp_path):
    assert run(load_run_config([toml], ENDS)) == 0
    files = {file.name: file.read_bytes() for file in (tmp_path / "run" / "hf").iterdir()}
    with serving({"org/start": files}) as hub:
        places = {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
        overrides = ["train.steps=1", "lr_schedule.warmup_steps=0", "optim.lr=1e-30", "lr_schedule.min_lr=0"]
        overrides += ["optim.weight_decay=0", "checkpoint.init=hub:org/start", f"runtime.run_dir={tmp_path / 'next'}"]
        options = [part for text in overrides for part in ("--set", text)]
        command = [sys.executable, "-m", "mt_cli", "train", str(toml), *options]
        done = subprocess.run(command, env=os.environ | places, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    start, end = (dict(open_checkpoint(path).tensors()) for path in (tmp_path / "run", tmp_path / "next"))
    assert all(torch.equal(tensor, end[name]) for name, tensor in start.items())
