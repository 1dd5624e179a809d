"""Mistakes of a newcomer's first hour: each is one line on stderr that says what to do, never a traceback."""

import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mt_cli.main import app
from mt_cli.train import command
from mt_core.errors import MtError
from tiny import byte_corpus, run_toml


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A directory with a text, an empty directory, and a run that could be trained."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("hello world, this is text", "utf-8")
    (tmp_path / "lines.jsonl").write_text('{"text": "x"}\n', "utf-8")
    (tmp_path / "bad.toml").write_text("[train\n", "utf-8")
    (tmp_path / "empty").mkdir()
    run_toml(tmp_path / "run.toml", byte_corpus(tmp_path / "bytes", files=2), Path("run"))
    return tmp_path


def mt(*words: str):
    return CliRunner().invoke(app, words, catch_exceptions=False)


def set_in_run(*overrides: str) -> list[str]:
    return ["train", "run.toml", *(part for text in overrides for part in ("--set", text))]


MISTAKES = {
    "no configuration": (["train"], "configuration: none is given; give a TOML file, a text with mt train --data, or"),
    "no such file": (["train", "rum.toml"], "rum.toml: no such file; did you mean run.toml?"),
    "no such folder": (["train", "no/run.toml"], "no/run.toml: no such file; its folder no does not exist either"),
    "a directory": (["train", "empty"], "empty: is a directory; give a TOML file of settings"),
    "a text": (["train", "text.txt"], "a text to train on goes to: mt train --data text.txt"),
    "JSON lines": (["config", "check", "lines.jsonl"], "a text to train on goes to: mt train --data lines.jsonl"),
    "broken TOML": (["train", "bad.toml"], "bad.toml: not TOML: "),
    "a misspelt section": (set_in_run("trian.steps=3"), "--set: trian: unknown key; did you mean 'train'?"),
    "a misspelt key": (set_in_run("train.step=3"), "--set: train.step: unknown key; did you mean 'steps'?"),
    "a word for a number": (
        set_in_run("train.steps=many"),
        "--set: train.steps: 'many'; input should be a valid integer",
    ),
    "a value for a list": (set_in_run("data.paths=text"), "--set: data.paths: 'text'; a list, in brackets: [\"text\"]"),
    "a value for a table": (set_in_run("optim=3"), "--set: optim: 3; a table: set its fields, as optim.FIELD"),
    "a value for a model": (set_in_run("model=3"), "--set: model: 3; a table: set its fields, as model.FIELD"),
    "a negative number": (set_in_run("train.steps=-1"), "--set: train.steps: -1; input should be greater than 0"),
    "an unknown choice": (
        set_in_run("runtime.device=gpu"),
        "--set: runtime.device: 'gpu'; input should be 'auto', 'cpu'",
    ),
    "corpora that are not there": (
        set_in_run('data.paths=["corpus"]'),
        "data.paths: no file corpus.bin and corpus.idx",
    ),
    "an unknown tokenizer": (set_in_run("data.tokenizer.type=BYTES"), "unknown name 'BYTES'; did you mean 'bytes'?"),
    "an unknown optimizer": (set_in_run("optim.name=AdamW"), "unknown optimizer 'AdamW'; did you mean 'adamw'?"),
    "an unknown attention": (set_in_run("model.attention.core=SDPA"), "attention core 'SDPA'; did you mean 'sdpa'?"),
    "an unknown preset": (
        ["train", "--preset", "GPT-tiny"],
        "preset: unknown name 'GPT-tiny'; did you mean 'gpt-tiny'?",
    ),
    "an unknown command": (["trian"], "command: unknown name 'trian'; did you mean 'train'?"),
    "a GPU on a CPU": (set_in_run("runtime.device=cuda"), "runtime.device: 'cuda', but no GPU is available here;"),
    "more ranks than run": (set_in_run("parallel.data=2"), "data 2 = 2, but 1 ranks run; start 2 ranks, or leave"),
    "no checkpoint": (["generate", "--prompt", "x"], "--load-dir: no checkpoint; give one: a run, a step or a Hugging"),
    "no checkpoint there": (
        ["generate", "empty", "--prompt", "x"],
        "empty: holds no checkpoint of a known format; looked",
    ),
    "a hub name": (["generate", "org/name", "--prompt", "x"], "to fetch it from the Hugging Face hub: --loader hub"),
}


@pytest.mark.parametrize(("words", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_do(folder, words, message):
    if "runtime.device=cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(MtError) as raised:
        mt(*words)
    (problem,) = raised.value.problems
    assert message in str(problem)
    assert "\n" not in str(problem)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_directory_that_is_a_run_suggests_its_configuration(folder):
    (folder / "empty" / "config.toml").touch()
    with pytest.raises(MtError, match="^empty: is a directory; did you mean empty/config.toml"):
        mt("train", "empty")


def test_more_ranks_than_cores_are_told(folder, monkeypatch, capsys):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr("mt_core.distributed.launcher.launch", lambda *args, **options: 0)
    assert command._launch([Path("run.toml")], [], None, 2, 0, False) == 0
    told = "mt: --nproc: 2 ranks on 1 cores; on a CPU start at most 1, else each waits for the others\n"
    assert capsys.readouterr().err == told
