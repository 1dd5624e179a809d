"""What `mt train` says at its start and its end; the lines of steps are asserted with the runs themselves."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mt_cli.run_config import load_run_config
from mt_cli.train.compose import run
from mt_cli.train.report import RunSummary, describe_data, describe_run
from mt_data.indexed.reader import IndexedReader
from tiny import byte_corpus, run_toml


@pytest.fixture
def toml(tmp_path) -> Path:
    corpus = byte_corpus(tmp_path / "bytes_text_document", files=20)
    return run_toml(tmp_path / "run.toml", corpus, tmp_path / "run", train={"eval_every": 3, "eval_batches": 1})


def test_a_run_says_how_it_runs_and_what_came_of_it(toml, tmp_path, capsys):
    assert run(load_run_config([toml])) == 0
    printed = capsys.readouterr()
    rows = dict(line.split(maxsplit=1) for line in printed.err.splitlines() if not line.startswith((" ", "mt:")))
    assert rows["device"] == "cpu, 1 thread, fp32"
    assert rows["back"] == "ends   attention sdpa, optimizer adamw, not compiled"
    assert rows["data"].startswith(f"{tmp_path / 'bytes_text_document'}: 20 documents, ")
    tokens, epochs = re.findall(
        r"documents, ([\d,]+) tokens to train on; the run reads ([\d.]+) epochs$", rows["data"]
    )[0]
    assert float(epochs) == pytest.approx(6 * 4 * 32 / int(tokens.replace(",", "")), rel=5e-3)
    loss, valid = printed.out.splitlines()[-2].split(" | ")[1], printed.out.splitlines()[-1].rpartition(" ")[2]
    begin = printed.out.splitlines()[0].split(" | ")[1].removeprefix("loss ")
    assert rows["loss"] == f"{loss.removeprefix('loss ')} at step 6, {begin} at step 1; validation {valid}"
    assert rows["speed"].endswith(" tokens/s; 0:00:00 of steps")
    assert 0.1 < float(rows["memory"].removesuffix(" GiB at most")) < 10
    assert rows["next"] == f'mt generate {tmp_path / "run"} --prompt "…"'
    assert printed.err.endswith(f"mt train {tmp_path / 'run' / 'config.toml'} --set train.steps=12\n")


def test_a_line_comes_before_torch_is_imported(toml, blocking):
    command = [sys.executable, "-m", "mt_cli", "train", str(toml)]
    environment = os.environ | {"PYTHONPATH": str(blocking("torch"))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    first, *_ = done.stderr.splitlines()
    assert first.startswith("mt: training a gpt of ")
    assert first.endswith(f" parameters: 6 steps of 4 × 32 tokens, into {toml.with_name('run')}")
    assert "torch was imported" in done.stderr


@pytest.mark.slow
def test_only_the_first_rank_prints(toml):
    command = [sys.executable, "-m", "mt_cli", "train", str(toml), "--nproc", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for line in ("mt: training a gpt", "device      2 ranks, each cpu", "back ends ", "loss ", "memory "):
        assert done.stderr.count(f"\n{line}") + done.stderr.startswith(line) == 1, line
    assert done.stdout.count("step 6/6 | loss") == 1


def test_blends_have_a_span_of_epochs_and_conversations_are_counted(tmp_path):
    corpora = [str(byte_corpus(tmp_path / f"{name}_document", files=files)) for name, files in (("a", 4), ("b", 8))]
    paths = f'data.paths=["0.5", "{corpora[0]}", "0.5", "{corpora[1]}"]'
    config = load_run_config([], [paths, "train.steps=500", 'data.split="1"', "data.tokenizer.type=bytes"], "gpt-tiny")
    said = describe_data(config)
    assert said.startswith(f"{corpora[0]}, {corpora[1]}: 12 documents, ")
    least, most = map(float, said.rpartition("the run reads ")[2].removesuffix(" epochs").split(" to "))
    small, large = (IndexedReader(prefix).token_count for prefix in corpora)
    assert most / least == pytest.approx(large / small, rel=0.02)
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}\n' * 10)
    sft = [f"data.paths=['{chat}']", 'data.split="1"', "data.tokenizer.type=bytes"]
    config = load_run_config([], ["data.kind=sft", "data.seq_length=64", *sft], "gpt-tiny", rules=False)
    assert describe_data(config).startswith(f"{chat}: 10 conversations; the run reads ")


def test_a_run_of_one_step_was_no_run_of_many(toml):
    config = load_run_config([toml], ["train.steps=1", "lr_schedule.warmup_steps=0"])
    assert ": 1 step of 4 × 32 tokens, into " in describe_run(config)


def test_a_summary_without_logged_steps_reports_no_loss():
    assert [name for name, _ in RunSummary().describe(torch.device("cpu"))] == ["memory"]
