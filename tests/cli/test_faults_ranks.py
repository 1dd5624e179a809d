"""Ranks that hang, are killed or never come: everyone ends in time and says why, and no committed step is lost."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mt_core.checkpoint import native
from tiny import byte_corpus, metrics, run_toml

pytestmark = pytest.mark.slow

MT = [sys.executable, "-m", "mt_cli"]

PLUGIN = '''
"""An AdamW that, on rank 1 and in the middle of step 5, does what FAULT says; once, if FAULT_ONCE names a file."""

import os
import signal
import time
from pathlib import Path

from mt_core.plugins import Component, hookimpl


@hookimpl
def mt_components():
    return [Component("optimizer", "faulty", "mt_faulty:faulty", "For tests.")]


def faulty(groups, config):
    from mt_core.training.optimizer import adamw

    optimizer, steps = adamw(groups, config), iter(range(1, 1000))
    if os.environ.get("FAULT_IN") == "forward":
        from torch.nn.modules.module import register_module_forward_pre_hook

        calls = iter(range(1, 1000))
        register_module_forward_pre_hook(
            lambda module, _: misbehave()
            if os.environ["RANK"] == "1" and type(module).__name__ == "Block" and next(calls) == 10
            else None
        )
        return optimizer
    optimizer.register_step_pre_hook(lambda *_: misbehave() if next(steps) == 5 and os.environ["RANK"] == "1" else None)
    return optimizer


def misbehave():
    if once := os.environ.get("FAULT_ONCE"):
        if Path(once).exists():
            return
        Path(once).touch()
    match os.environ.get("FAULT"):
        case "sleep":
            time.sleep(3600)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
'''


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return byte_corpus(tmp_path_factory.mktemp("corpus") / "bytes_text_document")


@pytest.fixture
def toml(tmp_path, corpus, plugin: Callable[..., Path], monkeypatch):
    """A run of 8 steps with a checkpoint every 2, whose optimizer fails in step 5 as FAULT says."""
    paths = [str(plugin("mt-faulty", PLUGIN)), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    changes = {"optim": {"name": "faulty"}, "checkpoint": {"every": 2}, "train": {"steps": 8}}
    return run_toml(tmp_path / "run.toml", corpus, tmp_path / "run", **changes)


def train(toml: Path, *words: object, **variables: object) -> subprocess.CompletedProcess[str]:
    """`mt train` on two ranks, with words after it and further variables."""
    command = [*MT, "train", str(toml), "--nproc", "2", *map(str, words)]
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def table(text: str) -> list[list[str]]:
    """Rows of the launcher's table, cells cut at two spaces."""
    lines = text.partition("mt: the run failed; where each rank was:\n")[2].splitlines()
    return [re.split(r"  +", line) for line in lines[:3]]


def assert_same_end(one: Path, two: Path, step: int) -> None:
    """Weights, optimizer and logged numbers are bit-equal."""
    assert metrics(one) == metrics(two)
    for part in ("model", "optim"):
        first, second = (dict(native.stream(native.step_directory(run, step), part)) for run in (one, two))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_rank_that_hangs_is_named_with_the_stacks_of_all(toml):
    done = train(toml, "--set", "runtime.stall_timeout=3", FAULT="sleep")  # an hour long, were it not ended
    assert done.returncode == 4
    assert "mt [rank 1]: no progress for 3 s (runtime.stall_timeout) in step 5, phase 'optimizer'" in done.stderr
    head, _, one = table(done.stderr)
    assert head == ["rank", "step", "phase", "since", "host", "pid", "end"]
    assert one[:3] == ["1", "5", "optimizer"]
    assert float(one[3].removesuffix(" s")) >= 3
    assert one[-1] == "exit 4: made no progress"
    assert done.stderr.index("mt: stacks of rank 0") < done.stderr.index("mt: stacks of rank 1")
    assert "in misbehave" in done.stderr.partition("mt: stacks of rank 1")[2]
    assert "in misbehave" not in done.stderr.partition("mt: stacks of rank 1")[0]


def test_after_a_kill_in_a_step_a_restarted_run_equals_an_unbroken_one_bit_for_bit(tmp_path, toml):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(toml, "--set", f"runtime.run_dir={whole}").returncode == 0
    options = ["--max-restarts", 1, "--set", f"runtime.run_dir={cut}"]
    done = train(toml, *options, FAULT="kill", FAULT_ONCE=tmp_path / "once")
    assert done.returncode == 0, done.stderr
    _, zero, one = table(done.stderr)
    assert one[-1] == "killed by SIGKILL"
    if torch.cuda.device_count() > 1:  # NCCL does not notice, so the launcher ends the others
        assert zero[-1] == "stopped by the launcher (SIGKILL)", done.stderr
    else:
        assert zero[-1] == "exit 5: lost another rank", done.stderr
        assert "mt [rank 0]: lost another rank in" in done.stderr
    assert "mt: starting all ranks again; restarts left: 0" in done.stderr
    assert f"mt: resuming from {cut / 'step-00000004'}" in done.stderr
    assert_same_end(whole, cut, 8)


def test_a_stage_killed_in_a_pass_ends_the_others_and_a_restart_goes_on_bit_for_bit(tmp_path, toml):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    stages = ["--set", "parallel.pipeline=2"]  # one block a rank and two microbatches: the tenth call is in step 5
    assert train(toml, *stages, "--set", f"runtime.run_dir={whole}").returncode == 0
    options = [*stages, "--max-restarts", 1, "--set", f"runtime.run_dir={cut}"]
    done = train(toml, *options, FAULT="kill", FAULT_IN="forward", FAULT_ONCE=tmp_path / "once")
    assert done.returncode == 0, done.stderr
    _, zero, one = table(done.stderr)
    assert one[-1] == "killed by SIGKILL"
    assert zero[-1] in ("exit 5: lost another rank", "stopped by the launcher (SIGKILL)"), done.stderr
    assert f"mt: resuming from {cut / 'step-00000004'}" in done.stderr
    assert_same_end(whole, cut, 8)


def test_restarts_without_ranks_to_start_are_refused(mt, toml):
    done = mt("train", toml, "--max-restarts", "1")
    assert (done.returncode, done.stderr) == (
        2,
        "mt: --max-restarts: given without --nproc; torchrun has one of its own\n",
    )


def wait_for(is_done: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait until `is_done()` is true; the run must not end before."""
    end = time.monotonic() + 600
    while not is_done():
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)


def test_a_rank_killed_in_a_save_leaves_the_step_before_it(tmp_path, toml):
    run_dir = tmp_path / "run"
    options = ["model.hidden_size=256", "model.mlp.ffn_hidden_size=2048", "checkpoint.every=1", "train.steps=40"]
    command = [*MT, "train", str(toml), "--nproc", "2", *(part for text in options for part in ("--set", text))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(native.steps(run_dir)) >= 2, process)
    wait_for(lambda: list(run_dir.glob("*step-*.tmp/**/*.safetensors")), process)
    os.kill(json.loads((run_dir / "heartbeats" / "rank-00000.json").read_text())["pid"], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    unfinished = [path for path in run_dir.glob("*step-*") if path not in native.steps(run_dir)]
    assert unfinished
    last = native.resolve(run_dir)
    native.read_meta(last)
    assert {"embed.weight", "norm.weight"} <= {name for name, _ in native.stream(last)}


def ranks_by_hand(toml: Path, *places: dict[str, str], words: tuple[str, ...] = ()) -> list[subprocess.Popen[str]]:
    """Ranks that nobody launches but this test, each with variables of its own."""
    command = [*MT, "train", str(toml), *words]
    return [
        subprocess.Popen(command, env=os.environ | place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for place in places
    ]


def port() -> str:
    """A port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def test_two_tasks_of_srun_train(tmp_path, toml):
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NODEID": "0"}
    step |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2"}
    ranks = ranks_by_hand(toml, *(step | {"SLURM_PROCID": n, "SLURM_LOCALID": n} for n in "01"))
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert metrics(tmp_path / "run")[-1]["step"] == 8
    assert outputs[1][0] == ""
    beats = [json.loads((tmp_path / "run" / "heartbeats" / f"rank-0000{n}.json").read_text()) for n in "01"]
    assert [(beat["ranks"], beat["phase"]) for beat in beats] == [(2, "done"), (2, "done")]


def test_ranks_that_never_come_are_named_by_those_that_did(toml):
    common = {"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port(), "LOCAL_WORLD_SIZE": "4"}
    words = ("--set", "runtime.stall_timeout=3", "--set", "batch.global_batch=8")
    ranks = ranks_by_hand(toml, *(common | {"RANK": n, "LOCAL_RANK": n} for n in "02"), words=words)
    for number, rank in zip("02", ranks, strict=True):
        error = rank.communicate(timeout=60)[1]
        message = "ranks 1, 3 of 4 did not come within 3 s (runtime.stall_timeout): ending"
        assert f"mt [rank {number}]: {message}" in error
        assert rank.returncode == 3


RENDEZVOUS = "keep_alive_interval=1,keep_alive_max_attempt=10,last_call_timeout=6,join_timeout=200"
"""A node is lost after ten seconds without a word (two are too few on a busy machine: a living node was given up), not
torchrun's 15, and its place is kept for six, not 30."""


def agent(toml: Path, address: str) -> subprocess.Popen[str]:
    """A torchrun with one rank: a node, in a process group of its own.

    One store for the agents and the ranks is what torchrun would take, but a node that joins in a later round waits for
    its address for ever: the first node writes it only in the round in which it makes the store (torch 2.11).
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", address, "--rdzv-conf", RENDEZVOUS, "--rdzv-id", "test"]
    command += ["--max-restarts", "20", "-m", "mt_cli", "train", str(toml)]
    command += ["--set", "train.steps=400", "--set", "checkpoint.every=20"]
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def heartbeats(run_dir: Path) -> list[dict[str, int]]:
    """What the ranks last said, by rank."""
    return [json.loads(path.read_text()) for path in sorted((run_dir / "heartbeats").glob("rank-*.json"))]


def test_when_a_node_is_lost_the_others_go_on_from_the_last_checkpoint(tmp_path, toml):
    run_dir, address = tmp_path / "run", f"localhost:{port()}"
    first = agent(toml, address)
    wait_for(lambda: answers(address), first)  # it is the one that holds the rendezvous
    second = agent(toml, address)
    wait_for(lambda: [beat["ranks"] for beat in heartbeats(run_dir)] == [2, 2], first)  # it may begin alone
    saved = len(native.steps(run_dir))
    wait_for(lambda: len(native.steps(run_dir)) >= saved + 3, first)
    beats = heartbeats(run_dir)
    assert [beat["ranks"] for beat in beats] == [2, 2]
    lost = next(beat["pid"] for beat in beats if parent(beat["pid"]) == second.pid)
    second.kill()
    os.kill(lost, signal.SIGKILL)
    second.communicate(timeout=30)
    error = first.communicate(timeout=120)[1]
    assert first.returncode == 0, error
    assert "lost another rank in" in error
    assert "mt: resuming from" in error
    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(1, 401))
    assert lines[-1]["samples"] == 4 * 400
    assert json.loads((run_dir / "heartbeats" / "rank-00000.json").read_text())["ranks"] == 1
    assert not (run_dir / "heartbeats" / "rank-00001.json").exists()


def answers(address: str) -> bool:
    """Whether somebody listens there."""
    host, _, number = address.partition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(number))) == 0


def parent(pid: int) -> int:
    """The process that started one."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
