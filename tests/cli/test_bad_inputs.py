"""Every file that `mt train`, `mt config` and `mt plan` open, in every bad state: one line a problem, no traceback."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bad_inputs import DIGITS, Result, assert_one_clean_line, bad_directories, bad_files, fill_disk, run_mt
from chat_tokenizers import CHATML, write_chat_tokenizer
from mt_data.indexed.writer import IndexedWriter
from tiny import run_toml

ONE_STEP = {"train": {"steps": 1}, "lr_schedule": {"warmup_steps": 0}, "checkpoint": {"at_end": False}}
MESSAGES = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "four"}]


def assert_clean(done: Result, fault: str, *, may_succeed: bool = False) -> None:
    """One line for each problem, where there are several."""
    lines = done.stderr.splitlines()
    if len(lines) > 1 and all(line.startswith("mt: ") for line in lines):
        done = replace(done, stderr=lines[0])
    assert_one_clean_line(done, fault, may_succeed=may_succeed)


def write_corpus(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(folder / "pair", np.dtype("uint16")) as writer:
        for number in range(9):
            writer.add_document(np.arange(number + 40), np.array([number + 40]))
    return folder / "pair"


def write_run(folder: Path, **data: object) -> Path:
    """The configuration of a run of one step over a corpus that is right, or as `data` says."""
    return run_toml(folder / "run.toml", write_corpus(folder / "corpus"), folder / "run", data=data, **ONE_STEP)


def write_chat_run(folder: Path, conversations: Path, tokenizer: Path) -> Path:
    """The configuration of a run of one step over conversations, with the tokenizer's own template."""
    named = {"type": "HuggingFaceTokenizer", "model": str(tokenizer), "vocab_file": None}
    data = {"kind": "sft", "paths": [str(conversations)], "split": "1", "prompt_format": "template", "seq_length": 64}
    model = {"vocab_size": 272, "max_seq_len": 64}
    tokens = {key: value for key, value in named.items() if value}
    return run_toml(
        folder / "run.toml", conversations, folder / "run", data={**data, "tokenizer": tokens}, model=model, **ONE_STEP
    )


def train(path: Path) -> Result:
    shutil.rmtree(path.parent / "run", ignore_errors=True)
    return run_mt("train", path)


@pytest.mark.parametrize("command", [("train",), ("config", "show"), ("config", "check"), ("plan",)])
def test_a_configuration(tmp_path: Path, command: tuple[str, ...]):
    example = write_run(tmp_path)
    for fault, path in bad_files(tmp_path, example):
        assert_clean(run_mt(*command, path), f"{command}, {fault}")
    assert_clean(run_mt("config", "diff", example, tmp_path / "absent.toml"), "diff")


@pytest.mark.parametrize(
    "value", ["9" * DIGITS, "[" * 100_000, "\ud800", '"\ud800"', '["\ud800"]'], ids=["digits", "deep", "a", "b", "c"]
)
def test_values_that_python_does_not_read(tmp_path: Path, value: str):
    example = write_run(tmp_path)
    for field in ("train.steps", "data.paths", "data.split"):
        assert_clean(run_mt("config", "check", example, "--set", f"{field}={value}"), field)
    if value.isascii():
        (tmp_path / "more.toml").write_text(f"train.steps = {value}\n")
        assert_clean(run_mt("config", "check", example, tmp_path / "more.toml"), "in a file")


def test_a_corpus(tmp_path: Path):
    example = write_run(tmp_path)
    right = train(example)
    assert right.returncode == 0, right.stderr
    corpus = tmp_path / "corpus"
    for fault, path in bad_directories(tmp_path, corpus):
        shutil.rmtree(tmp_path / "in-use", ignore_errors=True)
        run = write_run(tmp_path / "in-use", paths=[str(path / "pair")])
        assert_clean(train(run), fault, may_succeed=fault.startswith(("not UTF-8", "no permission: corpus:")))


LISTS: dict[str, Callable[[str], str]] = {
    "paths_file": lambda prefix: f"1 {prefix}\n",
    "split_paths_file": lambda prefix: json.dumps({"train": [prefix], "valid": None, "test": None}),
}


@pytest.mark.parametrize("field", LISTS)
def test_a_list_of_corpora(tmp_path: Path, field: str):
    prefix = write_corpus(tmp_path / "corpus")
    example = tmp_path / "lists" / ("list.json" if field == "split_paths_file" else "list.txt")
    example.parent.mkdir()
    example.write_text(LISTS[field](str(prefix)))
    options = {"split": "1"} if field == "paths_file" else {"split": "969,30,1"}
    right = train(write_run(tmp_path, paths=[], **{field: str(example)}, **options))
    assert right.returncode == 0, right.stderr
    for fault, path in bad_files(tmp_path, example):
        done = train(write_run(tmp_path, paths=[], **{field: str(path)}, **options))
        assert_clean(done, f"{field}, {fault}", may_succeed=fault.startswith("lone surrogate"))


def test_conversations_and_their_tokenizer(tmp_path: Path):
    conversations, tokenizer = tmp_path / "chat" / "chat.jsonl", tmp_path / "tokenizer"
    conversations.parent.mkdir()
    conversations.write_text((json.dumps({"messages": MESSAGES}) + "\n") * 3)
    write_chat_tokenizer(tokenizer)
    (tokenizer / "chat_template.jinja").write_text(CHATML)
    right = train(write_chat_run(tmp_path, conversations, tokenizer))
    assert right.returncode == 0, right.stderr
    for fault, path in bad_files(tmp_path, conversations):
        done = train(write_chat_run(tmp_path, path, tokenizer))
        assert_clean(done, fault, may_succeed=fault.startswith("lone surrogate"))
    for fault, path in bad_directories(tmp_path, tokenizer):
        done = train(write_chat_run(tmp_path, conversations, path))
        assert_clean(done, fault, may_succeed=True)


def test_a_run_directory_that_cannot_be_written(tmp_path: Path, small_disk: Path):
    example, sealed = write_run(tmp_path), tmp_path / "sealed"
    sealed.mkdir()
    sealed.chmod(0o500)
    fill_disk(small_disk)
    for folder in (sealed, example, small_disk):
        assert_clean(run_mt("train", example, "--set", f"runtime.run_dir={folder / 'run'}"), str(folder))
