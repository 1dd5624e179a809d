"""Fixtures for every part."""

import fcntl
import gc
import os
import pickle
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from preloaded import processes

HERE = Path(__file__).parent

gc.disable()  # until everything is collected: see pytest_collection
os.environ["OMP_NUM_THREADS"] = "1"  # several tests run at a time, and their commands
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no pool of processes that each import torch
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"  # nor one for each vector instruction set that the processor lists
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # commands that tests start find compiled modules: 3 s less each
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell sets it in the background, and children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Woken ranks take no processor from those that run: one stopped in a lock of gloo's keeps gloo's other thread spinning.
os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
processes.install(processes.fork_from_server)


def pytest_configure(config: pytest.Config) -> None:
    """Set up processes that run tests: one that only leads workers does without torch's import."""
    if config.option.numprocesses:
        return
    import torch
    from hypothesis import HealthCheck, settings

    torch.set_num_threads(1)
    settings.register_profile("loaded machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("loaded machine")


@pytest.fixture
def real_processes() -> Iterator[None]:
    """Commands of this test are interpreters of their own, not forks of one that has imported everything."""
    with processes.real_processes():
        yield


@pytest.fixture(scope="session")
def megatron_core() -> None:
    """Skip where Megatron-Core is missing. Tests and ranks import it where they use it: 1.5 s of processor time."""
    if not find_spec("megatron"):
        pytest.skip("Megatron-Core is not installed")


@pytest.fixture
def add_component() -> Iterator[Callable[..., None]]:
    """`add_component("ckpt-saver", "name", "package.module:attribute")`: a third party's plugin, for one test."""
    from mt_core.plugins import Component, hookimpl, manager

    added = []

    def add(kind: Any, name: str, target: str) -> None:
        class Plugin:
            @hookimpl
            def mt_components(self) -> list[Any]:
                return [Component(kind, name, target, "added by a test")]

        added.append(manager().register(Plugin(), name=f"test-{kind}-{name}"))

    yield add
    for name in added:
        manager().unregister(name=name)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB, to be filled; needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here: needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a tensor may still be mapped from it


@pytest.fixture
def shared_data() -> Path:
    """The founders' real data; skips where it is missing."""
    folder = Path(__file__).parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


@pytest.fixture(scope="session")
def build_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`build_once("name", build)` → a directory that `build` filled, once for all processes that run these tests."""
    here = tmp_path_factory.getbasetemp()
    shared = here.parent if "PYTEST_XDIST_WORKER" in os.environ else here

    def get(name: str, build: Callable[[Path], object]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                build(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def compute_once(build_once) -> Callable[[str, Callable[[], Any]], Any]:
    """`compute_once("name", compute)` → what `compute` returned, once for all processes that run these tests."""
    values: dict[str, Any] = {}

    def get(name: str, compute: Callable[[], Any]) -> Any:
        if name not in values:
            folder = build_once(name, lambda folder: (folder / "value").write_bytes(pickle.dumps(compute())))
            values[name] = pickle.loads((folder / "value").read_bytes())
        return values[name]

    return get


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Look for garbage only after collection, and only in what tests make: modules and items are a million objects."""
    result = yield
    gc.freeze()
    gc.enable()
    return result


def pytest_collection_modifyitems(items) -> None:
    """Skip tests marked `gpu` where there is none, and mark those of the documentation."""
    import torch

    for item in items:
        if item.path.is_relative_to(HERE / "docs"):
            item.add_marker(pytest.mark.docs)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
