"""Kinds of data that another package brings: their own section of a run, checked as mt-data's own are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = """
from typing import Literal

from mt_core.plugins import Component, hookimpl
from mt_data.config import DataConfig


class WavesData(DataConfig):
    \"\"\"Sine waves.\"\"\"

    kind: Literal["waves"] = "waves"
    frequency: float = 1.0
    \"\"\"In hertz.\"\"\"


def build_splits(config: WavesData, *, samples, seed, cache_dir, builder=True):
    raise NotImplementedError


def silent(config, *, samples, seed, cache_dir, builder=True):
    raise NotImplementedError


@hookimpl
def mt_components():
    yield Component("dataset", "waves", "mt_waves:build_splits", "Waves.")
    yield Component("dataset", "silent", "mt_waves:silent", "Says nothing of its section.")
    yield Component("dataset", "absent", "mt_no_such_module:build", "Cannot be imported.", ("mt-absent",))
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A value of PYTHONPATH under which the plugin is installed, as pip leaves it."""
    metadata = tmp_path / "site" / "mt_waves-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mt-waves\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[mt]\nmain = mt_waves\n")
    (tmp_path / "site" / "mt_waves.py").write_text(PLUGIN)
    return tmp_path / "site"


def config(site: Path, action: str, data: str) -> subprocess.CompletedProcess[str]:
    path = site / "run.toml"
    path.write_text(f'preset = "gpt-tiny"\n[model]\nvocab_size = 257\n[data]\nseq_length = 16\n{data}\n')
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "mt_cli", "config", action, *([] if action == "schema" else [path])]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_kind_of_another_package_has_its_own_fields(site: Path):
    ran = config(site, "check", 'kind = "waves"\nfrequency = 440')
    assert (ran.returncode, ran.stderr) == (0, "")
    shown = config(site, "show", 'kind = "waves"\nfrequency = 440').stdout
    assert 'kind = "waves"' in shown
    assert "frequency = 440.0" in shown
    assert "In hertz." in config(site, "schema", "").stdout


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('kind = "waves"\nfrequenzy = 4', "data.frequenzy: unknown key; did you mean 'frequency'?"),
        ('kind = "waves"\npaths = ["a"]', "data.paths: unknown key; "),
        ('kind = "wave"', "data: unknown kind 'wave'; did you mean 'waves'? allowed: gpt, "),
        (
            'kind = "silent"',
            "dataset 'silent': mt_waves:silent does not say which section it reads; annotate its first parameter with "
            'a subclass of mt_data.config.DataConfig that has kind: Literal["silent"] = "silent"',
        ),
        ('kind = "absent"', "dataset 'absent': needs 'mt_no_such_module', which is not installed; pip install "),
    ],
)
def test_what_is_wrong_with_such_a_section(site: Path, data: str, message: str):
    ran = config(site, "check", data)
    assert ran.returncode == 2, ran.stderr
    assert message in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_broken_datasets_stop_no_other_kind(site: Path):
    ran = config(site, "check", "")
    assert (ran.returncode, ran.stderr) == (0, "")
