"""The checkpoint loader of docs/how-to/write-a-plugin.md, installed as the page says and used."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from docs.pages import DOCS, read
from mt_ckpt.conversion.convert import convert
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.plugin_options import read_options


def file_of_the_page(name):
    (step,) = (step for step in read(DOCS / "how-to" / "write-a-plugin.md").steps if step.title == name)
    return step.body


def test_the_saver_of_the_page_has_the_options_that_its_comments_say():
    source, scope = file_of_the_page("mt_rows.py"), {}
    exec(source, scope)
    options = read_options(scope["save"]).values()
    assert [option.usage for option in options] == re.findall("  # ([^,\n]+)", source)
    assert [option.name for option in options if option.description.endswith("[required]")] == ["width"]


@pytest.mark.slow
def test_the_loader_of_the_page_converts(save_model, tmp_path):
    convert("hf", save_model("llama"), "native", tmp_path / "native")
    source = open_checkpoint(tmp_path / "native")
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz" / "other.npz", **{name: tensor.numpy() for name, tensor in source.tensors()})
    (tmp_path / "npz" / "model.json").write_text(source.config().model_dump_json())
    step = file_of_the_page("mt_npz.py")
    loader, announced = step.split("@hookimpl")
    assert len([line for line in loader.splitlines() if line]) <= 18
    assert announced
    (tmp_path / "site" / "mt_npz-1.0.dist-info").mkdir(parents=True)
    (tmp_path / "site" / "mt_npz.py").write_text(step)
    (tmp_path / "site" / "mt_npz-1.0.dist-info" / "METADATA").write_text("Name: mt-npz\nVersion: 1.0\n")
    (tmp_path / "site" / "mt_npz-1.0.dist-info" / "entry_points.txt").write_text("[mt]\nnpz = mt_npz\n")
    options = [
        "--loader",
        "npz",
        "--load-dir",
        "npz",
        "--saver",
        "native",
        "--save-dir",
        "result",
        "--arrays",
        "other.npz",
        "--verify",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "mt_cli", "ckpt", "convert", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = dict(open_checkpoint(tmp_path / "result").tensors())
    assert all(torch.equal(tensor, result.pop(name)) for name, tensor in source.tensors())
    assert not result
