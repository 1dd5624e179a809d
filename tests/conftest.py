"""Fixtures for every part."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # commands that tests start find compiled modules: 3 s less each


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB, to be filled; needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here: needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def shared_data() -> Path:
    """The founders' real data; skips where it is missing."""
    folder = Path(__file__).parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


def pytest_collection_modifyitems(items) -> None:
    """Skip tests marked `gpu` where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
