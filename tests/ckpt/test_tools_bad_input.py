"""Damaged checkpoints: one report that names everything, exit code 2, nothing left behind; for every tool."""

import json
import subprocess
import sys

import pytest

from mt_ckpt.conversion.convert import convert
from mt_ckpt.tensor_streams.tokenizer_files import size_problems


def mt(*args):
    return subprocess.run(
        [sys.executable, "-m", "mt_cli", *map(str, args)], capture_output=True, text=True, check=False, timeout=60
    )


@pytest.fixture
def damaged(save_model):
    """Three shards and more, one of them missing and one cut off."""
    path = save_model("llama", shard="30KB")
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-1000])
    return path, shards[0].name, shards[1].name


@pytest.mark.parametrize("tool", ["inspect", "diff", "average", "convert"])
def test_a_missing_and_a_truncated_shard_are_one_report(tool, damaged, tmp_path):
    path, missing, truncated = damaged
    options = {
        "inspect": (path,),
        "diff": (path, path),
        "average": (path, path, "--save-dir", tmp_path / "result"),
        "convert": ("--load-dir", path, "--saver", "native", "--save-dir", tmp_path / "result"),
    }
    done = mt("ckpt", tool, *options[tool])
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{missing}: missing; model.safetensors.index.json names it" in done.stderr
    assert f"{truncated}: truncated or not safetensors" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("result*"))


def test_a_tokenizer_larger_than_the_embedding_is_refused(save_model, tmp_path):
    path = save_model("llama")
    vocab = {f"word{i}": i for i in range(70)}
    (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": [{"id": 99}]}))
    done = mt("ckpt", "convert", "--load-dir", path, "--saver", "native", "--save-dir", tmp_path / "result")
    assert done.returncode == 2
    assert f"{path / 'tokenizer.json'}: has ids up to 99, the model embeds 61; use the checkpoint's own" in done.stderr
    assert not list(tmp_path.glob("result*"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", {"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}),
        ("vocab.json", {"a": 0, "b": 1}),
        ("mt_tokenizer.json", {"vocab_size": 2}),
    ],
)
def test_every_kind_of_vocabulary_is_measured(name, content, tmp_path):
    (tmp_path / name).write_text(json.dumps(content))
    assert list(size_problems([tmp_path / name], 2)) == []
    assert [problem.actual for problem in size_problems([tmp_path / name], 1)] == [
        "has ids up to 1, the model embeds 1"
    ]


def test_an_embedding_with_rows_to_spare_is_right(save_model, tmp_path):
    path = save_model("llama")
    (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": []}))
    assert convert("hf", path, "native", tmp_path / "result").tensors == 30


def test_an_embedding_of_another_size_than_the_configuration_says_is_refused(save_model, tmp_path):
    path = save_model("llama")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 64}))
    done = mt("ckpt", "convert", "--load-dir", path, "--saver", "native", "--save-dir", tmp_path / "result")
    assert done.returncode == 2
    assert "embed.weight: tensor has shape (61, 32)" in done.stderr
    assert "head.weight: tensor has shape (61, 32)" in done.stderr
    assert not list(tmp_path.glob("result*"))


def convert_command(path, tmp_path, saver="native", *options):
    """What the command says, having refused and left nothing."""
    done = mt("ckpt", "convert", "--load-dir", path, "--saver", saver, "--save-dir", tmp_path / "result", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("result*"))
    return done.stderr


def test_missing_truncated_extra_and_disagreeing_shards_are_one_report(damaged, tmp_path):
    path, missing, truncated = damaged
    (path / "model-00099-of-00002.safetensors").write_bytes(b"")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    last = max(index["weight_map"].values())
    index["weight_map"]["model.layers.0.other"] = last
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    report = convert_command(path, tmp_path).splitlines()
    assert [line.split("/")[-1].split(";")[0] for line in report] == [
        f"{missing}: missing",
        next(line.split("/")[-1].split(";")[0] for line in report if truncated in line),
        f"{last}: has no tensor model.layers.0.other",
        "model-00099-of-00002.safetensors: model.safetensors.index.json does not name it",
    ]


def test_an_unknown_rope_scaling_and_activation_are_one_report(save_model, tmp_path):
    path = save_model("llama")
    config = json.loads((path / "config.json").read_text())
    config |= {"rope_parameters": {"rope_type": "spiral", "factor": 2.0}, "hidden_act": "mish"}
    (path / "config.json").write_text(json.dumps(config))
    report = convert_command(path, tmp_path)
    assert "'spiral'" in report
    assert "'mish'" in report


def test_heads_and_groups_that_do_not_fit_the_target_are_one_report(save_model, tmp_path):
    options = ("--target-tensor-parallel-size", 3)
    report = convert_command(save_model("llama"), tmp_path, "core", *options)
    assert "attention.heads = 4 does not divide by 3 tensor ranks" in report
    assert "attention.num_kv_heads = 2 and 3 tensor ranks; one must divide the other" in report
