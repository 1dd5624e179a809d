"""The installed `mt` as a user runs it, in an environment that a test can change."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

BLOCKER = """
import sys
from importlib.machinery import ModuleSpec

NAMES = {names!r}


class Blocker:
    '''Says that the modules are installed, as they are, and fails when one is really imported.'''

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name.partition(".")[0] in NAMES else None

    def create_module(self, spec):
        raise RuntimeError(f"{{spec.name}} was imported")

    def exec_module(self, module):
        raise AssertionError


sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture
def mt_executable() -> Path:
    """The `mt` of this environment."""
    return Path(sys.executable).with_name("mt")


@pytest.fixture
def mt(mt_executable: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`mt("config", "show", MT_DISABLE_PLUGINS="x")`: runs the executable with these words and variables."""

    def run(*words: object, **variables: object) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        command = [mt_executable, *map(str, words)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    return run


@pytest.fixture
def blocking(tmp_path: Path) -> Callable[..., Path]:
    """`blocking("torch")` → a value of PYTHONPATH under which no process, nor one it starts, can import torch."""

    def block(*names: str) -> Path:
        folder = tmp_path / "blocked"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(BLOCKER.format(names=set(names)))
        return folder

    return block


@pytest.fixture
def plugin(tmp_path: Path) -> Callable[..., Path]:
    """`plugin("mt-x", source)` → a value of PYTHONPATH that holds every plugin made so, installed as pip leaves it."""
    folder = tmp_path / "site"

    def install(distribution: str, source: str) -> Path:
        module = distribution.replace("-", "_")
        metadata = folder / f"{module}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[mt]\nmain = {module}\n")
        (folder / f"{module}.py").write_text(source)
        return folder

    return install
