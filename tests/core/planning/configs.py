"""Run configurations of the planning tests, loaded as `mt` loads them."""

from typing import Any

from mt_cli.run_config import load_run_config
from mt_core.planning.gpu_profile import Profile, read_profile

LLAMA8B_8L = ("model.layers=8", "batch.global_batch=4")
"""The shape of PERFORMANCE.md that trains on one GPU."""


def run(*overrides: str, preset: str = "llama3-8b") -> Any:
    """A preset with some values of its own; rules between sections are not asked."""
    return load_run_config([], overrides, preset, rules=False)


def h200() -> Profile:
    """The measured profile."""
    return read_profile("nvidia-h200")
