"""Every command of `mt ckpt` on every bad variant of a checkpoint, in every format: one line, nothing half-written."""

import itertools
import json
import shutil

import pytest
import torch

from bad_inputs import assert_one_clean_line, bad_directories, bad_files, fill_disk, run_mt
from ckpt.conftest import hugging_face_model
from mt_ckpt.conversion.convert import convert

FORMATS = ("hf", "native", "core", "torch_dist", "legacy")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One small model in every format, with a tokenizer's files."""
    path = tmp_path_factory.mktemp("checkpoints")
    hugging_face_model("gpt2", eos_token_id=[0, 3], n_layer=1).save_pretrained(path / "hf")
    (path / "hf" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": []}))
    (path / "hf" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "a"}))
    for saver in ("native", "core", "legacy"):
        convert("hf", path / "hf", saver, path / saver)
    convert("hf", path / "hf", "core", path / "torch_dist", options={"target_ckpt_format": "torch_dist"})
    return path


def commands(bad, good, out):
    """Command lines on a bad checkpoint; those that write have `out` for it."""
    yield "inspect", bad
    yield "convert", "--load-dir", bad, "--saver", "native", "--save-dir", out
    yield "diff", good, bad
    yield "convert", "--load-dir", bad, "--saver", "hf", "--save-dir", out
    yield "average", good, bad, "--save-dir", out
    yield "inspect", bad, "--json", "--hash"
    yield "upcycle", bad, "--experts", 2, "--save-dir", out
    yield "verify", bad, good
    yield "convert", "--load-dir", bad, "--saver", "core", "--save-dir", out, "--target-ckpt-format", "torch_dist"
    yield "convert-format", "--load-dir", bad, "--to", "torch", "--save-dir", out
    yield "prune", bad, "--keep", 1
    yield "push", bad, "nobody/nothing"


def check(command, name, out, *, may_succeed=False):
    """The command succeeds or says one line; a result is there if it succeeds, and else nothing of it."""
    shutil.rmtree(out.parent, ignore_errors=True)
    out.parent.mkdir()
    done = run_mt("ckpt", *command)
    assert_one_clean_line(done, name, may_succeed=may_succeed)
    assert not done.returncode or [*out.parent.iterdir()] == [], name


@pytest.mark.parametrize("command", range(12))
def test_every_command_refuses_a_directory_that_holds_no_checkpoint(command, checkpoints, tmp_path):
    example, out = checkpoints / "hf", tmp_path / "results" / "out"
    for name, bad in itertools.islice(bad_directories(tmp_path, example), 4):
        check([*commands(bad, example, out)][command], name, out)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_every_file_of_every_format_may_be_bad(form, checkpoints, tmp_path):
    """One command for each bad file, in turn: each opens the checkpoint by the same loader."""
    good, out = checkpoints / "hf", tmp_path / "results" / "out"
    for number, (name, bad) in enumerate(bad_directories(tmp_path, checkpoints / form)):
        lines = [line for line in commands(bad, good, out) if line[0] not in ("push", "prune")]
        for line in (lines[0], lines[1 + number % (len(lines) - 1)]):
            check(line, f"{' '.join(map(str, line[:1]))}, {form}, {name}", out, may_succeed=True)


@pytest.mark.parametrize("option", ["--megatron-args"])
def test_a_file_that_an_option_names_may_be_bad(option, checkpoints, tmp_path):
    example = tmp_path / "args.json"
    example.write_text(json.dumps({"num_layers": 1}))
    for name, bad in bad_files(tmp_path, example):
        may_succeed = name.startswith("lone surrogate")
        done = run_mt("ckpt", "inspect", checkpoints / "core", option, bad)
        assert_one_clean_line(done, name, may_succeed=may_succeed)


def writing_commands(path, out):
    """Command lines that write the small model, which has no training state and no gated layers."""
    return [
        line
        for line in commands(path, path, out)
        if "--save-dir" in line and line[0] not in ("upcycle", "convert-format")
    ]


def test_nothing_is_left_on_a_full_disk(small_disk, tmp_path):
    hugging_face_model("gpt2", vocab_size=60_000).to(torch.float32).save_pretrained(tmp_path / "large")  # 7.7 MB
    fill_disk(small_disk, left=1 << 20)
    out = small_disk / "results" / "out"
    for line in writing_commands(tmp_path / "large", out):
        check(line, str(line), out)


def test_a_directory_that_cannot_be_made_is_refused(checkpoints, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o500)
    (tmp_path / "file").write_text("")
    for parent in (closed, tmp_path / "file"):
        for line in writing_commands(checkpoints / "hf", parent / "out"):
            assert_one_clean_line(run_mt("ckpt", *line), str(line))
    closed.chmod(0o700)
