"""The example of GPT-3 175B: its page, what is planned, its batch script, and the run shrunk to four ranks."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from docs.pages import ROOT, matches, read
from mt_cli.run_config import load_run_config
from mt_core.checkpoint import native
from mt_core.distributed.slurm import step_variables
from mt_core.distributed.topology import resolve_dims
from mt_core.planning.gpu_profile import read_profile
from mt_core.training.lr_schedule import learning_rate
from mt_data.batching.batch_sizes import count_samples, make_batch_sizes
from preloaded import processes
from tiny import byte_corpus, metrics

EXAMPLE = ROOT / "examples" / "gpt3-175b"
SCRIPT = EXAMPLE / "run.sbatch"
CONFIG = load_run_config([EXAMPLE / "run.toml"], rules=False)
TOKENS, WARMUP_TOKENS, DECAY_TOKENS = 300e9, 375e6, 260e9
"""Tokens after which the published run has ended, is warmed up, and has its lowest rate."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A reader's environment, in which `mt` is a fork of a preloaded process."""
    folder = tmp_path_factory.mktemp("bin")
    processes.write_script(folder)
    path = f"{folder}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, processes.ADDRESS: processes.server_address()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The example, with a tokenizer of 300 ids and a small corpus."""
    from tokenizers import ByteLevelBPETokenizer

    here = tmp_path_factory.mktemp("gpt3")
    for name in ("run.toml", "small.toml"):
        shutil.copy(EXAMPLE / name, here)
    for name in ("tokenizer", "data"):
        (here / name).mkdir()
    tokenizer = ByteLevelBPETokenizer()
    source = str(Path(sysconfig.get_paths()["stdlib"]) / "argparse.py")
    tokenizer.train([source], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save_model(str(here / "tokenizer"))
    byte_corpus(here / "data" / "train_text_document", files=10)
    return here


def run(words: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    script = f"set -euo pipefail\n{words}"
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


def test_the_configuration_is_accepted(folder, environment):
    ran = run("mt config check run.toml", folder, environment)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("ok: 174,604,259,328 parameters, 300,000,935,936 tokens, ")


def test_1024_gpus_of_80_gb_are_enough(folder, environment):
    ran = run("mt plan run.toml --gpus 1024 --json --memory-gib 79.1", folder, environment)
    assert ran.returncode == 0, ran.stderr
    values = json.loads(ran.stdout)
    assert values["memory"]["fits"]
    assert max(values["memory"]["totals"]) == values["memory"]["total"] < values["memory"]["capacity"]
    assert values["memory"]["capacity"] == 79.1 * 2**30 < read_profile("nvidia-h200").memory_gib * 2**30
    assert values["model"]["parameters"] == 174_604_259_328
    growth = {"start": 16, "increment": 16, "samples": 5_859_375, "steps": 19_802}
    assert values["batch"] == {"global_batch": 1536, "growth": growth}
    axes = {name: values["layout"][name] for name in ("tensor", "pipeline", "data", "context")}
    assert axes == {"tensor": 8, "pipeline": 16, "data": 8, "context": 1}
    assert values["pipeline"]["microbatches"] == 192


def test_steps_are_the_first_that_reach_the_published_tokens():
    steps, sizes = CONFIG.train.steps, make_batch_sizes(CONFIG.batch)
    before, after = (count_samples(sizes, count) * CONFIG.data.seq_length for count in (steps - 1, steps))
    assert before < TOKENS <= after


def test_the_rate_counts_the_published_tokens():
    schedule, text = CONFIG.lr_schedule, (EXAMPLE / "README.md").read_text()
    for tokens, samples in ((WARMUP_TOKENS, schedule.warmup_samples), (DECAY_TOKENS, schedule.decay_samples)):
        assert samples == int(tokens / CONFIG.data.seq_length)
        assert f"{samples:,}" in text
    assert schedule.unit == "samples"


def test_the_page_shows_what_is_printed(folder, environment):
    shown = [step for step in read(EXAMPLE / "README.md").steps if step.output is not None]
    assert shown
    for step in shown:
        ran = run(step.body, folder, environment)
        assert ran.returncode == step.code
        assert matches(step.output or "", ran.stdout), ran.stdout


def test_reasons_of_the_page_are_the_plan_s(folder, environment):
    """Figures in its text: recompute, and ZBV."""
    text = (EXAMPLE / "README.md").read_text()
    words = ("--set recompute.granularity=full", "--schedule zbv")
    full, zbv = (
        json.loads(run(f"mt plan run.toml --gpus 1024 --json {word}", folder, environment).stdout) for word in words
    )
    assert f"needs {full['memory']['total'] / 2**30:.1f} GiB and\n" in text
    assert f"takes {full['step']['seconds'] * 1e3:,.0f} ms" in text
    plain = next(each for each in zbv["pipeline"]["schedules"] if each["schedule"] == "1f1b")
    assert f"{(1 - zbv['step']['seconds'] / plain['seconds']) * 100:.1f}% less time" in text
    assert all(word in text for word in words)


def list_directives() -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", SCRIPT.read_text(), re.MULTILINE)
    return dict(found)


def test_the_script_starts_a_rank_for_each_gpu():
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
    directives = list_directives()
    nodes, tasks, gpus = (int(directives[name]) for name in ("nodes", "ntasks-per-node", "gpus-per-node"))
    parallel = CONFIG.parallel
    dims = resolve_dims(parallel, nodes * tasks)
    assert nodes * tasks == parallel.tensor * parallel.pipeline * dims.data == 1024
    assert tasks == gpus == parallel.tensor
    (line,) = re.findall(r"^srun .*$", SCRIPT.read_text(), re.MULTILINE)
    words = shlex.split(line)
    options, command = words[1 : words.index("mt")], words[words.index("mt") :]
    assert command == ["mt", "train", "run.toml", "$@"]
    assert f"--ntasks-per-node={tasks}" in options
    (wait,) = (int(option.removeprefix("--wait=")) for option in options if option.startswith("--wait="))
    assert wait > CONFIG.runtime.stall_timeout  # ranks say themselves first why they end
    assert {"requeue", "exclusive"} <= directives.keys()
    last = step_variables(
        {
            "SLURM_PROCID": "1023",
            "SLURM_LOCALID": "7",
            "SLURM_NODEID": "127",
            "SLURM_STEP_NUM_TASKS": str(nodes * tasks),
            "SLURM_STEP_NODELIST": "node[001-128]",
            "SLURM_STEP_TASKS_PER_NODE": f"{tasks}(x{nodes})",
        }
    )
    assert (last["WORLD_SIZE"], last["LOCAL_RANK"], last["LOCAL_WORLD_SIZE"]) == ("1024", "7", "8")


def test_tensor_ranks_are_neighbours_on_a_machine():
    dims = resolve_dims(CONFIG.parallel, 1024)
    assert sorted(map(list, dims.groups("tensor"))) == [[*range(first, first + 8)] for first in range(0, 1024, 8)]


@pytest.mark.parametrize(
    ("code", "restarts", "queued"),
    [
        (0, 0, False),
        (1, 0, False),
        (2, 0, False),
        (130, 0, False),
        (143, 99, True),
        (4, 0, True),
        (5, 49, True),
        (5, 50, False),
        (137, 0, True),
    ],
)
def test_the_script_queues_again_what_can_go_on(tmp_path, code, restarts, queued):
    """Slurm's commands are stand-ins, which note their words: there is no Slurm here."""
    for name, end in (("srun", code), ("scontrol", 0)):
        (tmp_path / name).write_text(f'#!/bin/bash\necho "{name} $*" >> "{tmp_path}/calls"\nexit {end}\n')
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    environment |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
    ran = subprocess.run(["bash", SCRIPT, "--set", "optim.lr=1"], env=environment, cwd=tmp_path)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert ran.returncode == code
    assert calls[0].endswith(" mt train run.toml --set optim.lr=1")
    assert calls[1:] == (["scontrol requeue 17"] if queued else [])


def test_the_run_shrunk_to_four_ranks_is_that_of_one(folder, environment):
    (step,) = (step for step in read(EXAMPLE / "README.md").steps if step.output is None)
    ran = run(step.body, folder, environment)
    assert ran.returncode == 0, ran.stderr
    four, one = ([line for line in metrics(folder / name) if "loss" in line] for name in ("four", "one"))
    small = tomllib.loads((EXAMPLE / "small.toml").read_text())
    assert len(four) == len(one) == small["train"]["steps"]
    grown = [later["samples"] - line["samples"] for line, later in pairwise(one)]
    assert grown == sorted(grown)
    assert set(grown) == set(range(2, 17, 2))
    schedule = CONFIG.lr_schedule.model_copy(update=small["lr_schedule"])
    for line, later in pairwise(one):
        assert later["lr"] == learning_rate(schedule, CONFIG.optim.lr, 0, samples=line["samples"], steps=0)
    assert one[-1]["lr"] == schedule.min_lr < one[-4]["lr"]
    for ours, plain in zip(four, one, strict=True):
        for name in ("loss", "grad_norm", "lr", "samples"):
            assert ours[name] == pytest.approx(plain[name], rel=1e-12)
    last = [native.step_directory(folder / name, small["train"]["steps"]) for name in ("four", "one")]
    weights, plain = (dict(native.stream(path, "model")) for path in last)
    assert weights.keys() == plain.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-12, atol=1e-15, msg=name)
