"""`mt ckpt inspect`, `diff` and `verify`: what a checkpoint holds, and how two differ."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mt_ckpt.command import app
from mt_ckpt.conversion.convert import convert
from mt_ckpt.tensor_streams.streams import align_streams
from mt_ckpt.tools.differences import Tolerance, compare_tensors
from mt_core.errors import MtError


def mt_ckpt(*args):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def edit(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


@pytest.fixture
def hugging_face(native, tmp_path):
    """The model of `native`."""
    return tmp_path / "llama-source"


def test_inspect_shows_the_files_and_the_step(native):
    lines = mt_ckpt("inspect", native).stdout.splitlines()
    assert "step: 0" in lines
    assert any(line.startswith(f"files: 4 in {native / 'step-00000000'}, ") for line in lines)
    assert any(line.endswith("  model/rank-00000-of-00001-00001.safetensors") for line in lines)


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        ({"tensor": 2, "expert": 2, "expert_tensor": 1}, "tensor 2, expert 2, expert_tensor 1"),
        ({"tensor": 2, "expert": 2, "expert_tensor": None}, "tensor 2, expert 2, expert_tensor 2"),
        ({"expert": 2, "tensor": 2}, "tensor 2, expert 2"),
    ],
)
def test_inspect_tells_how_many_tensor_ranks_shared_an_expert(native, parallel, expected):
    path = native / "step-00000000" / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, "config": {**meta["config"], "parallel": parallel}}))
    assert f"parallel: {expected}" in mt_ckpt("inspect", native).stdout.splitlines()
    assert "expert_tensor" not in expected or json.loads(mt_ckpt("inspect", native, "--json").stdout)["run"][
        "parallel"
    ]["expert_tensor"] == int(expected[-1])


def test_inspect_as_json_has_every_tensor_and_file(native, hugging_face):
    ours, theirs = (json.loads(mt_ckpt("inspect", path, "--json").stdout) for path in (native, hugging_face))
    assert ours["tensors"][0] == {"name": "embed.weight", "shape": [61, 32], "dtype": "float32", "bytes": 7808}
    assert (ours["format"], theirs["format"]) == ("native", "hf")
    assert (ours["tensors"], ours["config"], ours["bytes"]) == (theirs["tensors"], theirs["config"], theirs["bytes"])
    assert theirs["files"]["model.safetensors"] == (hugging_face / "model.safetensors").stat().st_size
    assert ours["run"]["step"] == 0


def test_hashes_are_of_the_bytes_and_independent_of_the_format(native, hugging_face):
    ours, theirs = (json.loads(mt_ckpt("inspect", p, "--json", "--hash").stdout) for p in (native, hugging_face))
    norm = load_file(hugging_face / "model.safetensors")["model.norm.weight"]
    digest = hashlib.sha256(norm.numpy().tobytes()).hexdigest()
    assert {row["name"]: row["sha256"] for row in theirs["tensors"]}["norm.weight"] == digest
    assert ours["tensors"] == theirs["tensors"]
    assert f"{digest}  norm.weight" in mt_ckpt("inspect", native, "--hash").stdout.splitlines()


def test_one_model_in_two_formats_is_the_same(native, hugging_face):
    result = mt_ckpt("diff", native, hugging_face)
    assert (result.exit_code, result.stdout) == (0, "30 tensors: 30 the same, 0 different\n")


def test_unequal_numbers_are_told_by_tensor(native, hugging_face):
    def change(tensors):
        tensors["model.norm.weight"][3] += 0.5

    largest = load_file(hugging_face / "model.safetensors")["model.norm.weight"].abs().max().item()
    edit(hugging_face, change)
    result = mt_ckpt("diff", native, hugging_face)
    assert result.exit_code == 1
    line = f"  values    norm.weight  1 numbers differ by at most 0.5, relative {0.5 / largest:.3g}"
    assert result.stdout.splitlines() == [line, "30 tensors: 29 the same, 1 different"]


def test_a_tolerance_lets_differences_pass_and_still_shows_them(native, hugging_face):
    edit(hugging_face, lambda tensors: tensors["model.norm.weight"].add_(0.5))
    assert mt_ckpt("diff", native, hugging_face, "--atol", 0.4).exit_code == 1
    result = mt_ckpt("diff", native, hugging_face, "--atol", 0.6)
    assert result.exit_code == 0
    assert "  close     norm.weight" in result.stdout


def test_dtypes_differ_unless_a_tolerance_is_given(native, tmp_path):
    convert("native", native, "hf", tmp_path / "bf16", dtype="bf16")
    exact = json.loads(mt_ckpt("diff", native, tmp_path / "bf16", "--json").stdout)
    assert not exact["same"]
    assert {tensor["right"]["dtype"] for tensor in exact["tensors"]} == {"bfloat16"}
    assert mt_ckpt("diff", native, tmp_path / "bf16", "--rtol", 2**-8).exit_code == 0
    assert mt_ckpt("diff", native, tmp_path / "bf16", "--rtol", 2**-12).exit_code == 1


def test_equal_numbers_of_two_dtypes_differ_in_their_dtype():
    ones = torch.ones(3)
    exact = compare_tensors("a", ones, ones.half(), Tolerance())
    assert (exact.different, exact.numbers, exact.maximum) == (True, 0, 0.0)
    assert not compare_tensors("a", ones, ones.half(), Tolerance(absolute=1e-9)).different


def test_missing_tensors_shapes_and_settings_are_told_together(native, save_model, tmp_path):
    other = save_model("llama", num_hidden_layers=2, vocab_size=63)
    result = mt_ckpt("diff", native, other)
    assert result.exit_code == 1
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert {"setting layers: 3 in A, 2 in B", "setting vocab_size: 61 in A, 63 in B"} <= {*lines}
    assert "shape embed.weight [61, 32] in A, [63, 32] in B" in lines
    assert "missing layers.2.mlp.up.weight only in A" in lines
    swapped = json.loads(mt_ckpt("diff", other, native, "--json").stdout)["tensors"]
    assert {t["name"]: t["left"] for t in swapped}["layers.2.mlp.up.weight"] is None


@pytest.mark.parametrize(
    ("left", "right", "maximum"),
    [([1.0, float("nan")], [1.0, float("nan")], 0.0), ([1.0, float("nan")], [1.0, 2.0], float("inf"))],
)
def test_what_is_not_a_number_equals_itself_only(left, right, maximum):
    assert compare_tensors("a", torch.tensor(left), torch.tensor(right), Tolerance()).maximum == maximum


def test_infinities_are_equal_to_themselves():
    infinite = torch.tensor([float("inf"), -float("inf")])
    assert not compare_tensors("a", infinite, infinite.clone(), Tolerance()).different
    assert compare_tensors("a", infinite, -infinite, Tolerance()).maximum == float("inf")


def test_empty_tensors_are_the_same():
    assert not compare_tensors("a", torch.zeros(0), torch.zeros(0), Tolerance()).different


def test_streams_in_any_order_come_together():
    one, two = torch.zeros(1), torch.ones(1)
    pairs = {name: pair for name, pair in align_streams([[("a", one), ("b", two)], [("b", two), ("c", one)]])}
    assert list(pairs) == ["b", "a", "c"]
    assert (pairs["a"][1], pairs["c"][0]) == (None, None)


def test_verify_tells_equal_models_from_different_ones(native, hugging_face):
    same = mt_ckpt("verify", native, hugging_face)
    assert same.exit_code == 0
    assert [line.split(": logits")[0] for line in same.stdout.splitlines()] == [
        "equal: B in transformers = B in mt",
        "equal: A in mt = B in mt",
    ]
    edit(hugging_face, lambda tensors: tensors["model.norm.weight"].add_(0.5))
    different = mt_ckpt("verify", native, hugging_face)
    assert different.exit_code == 1
    assert different.stdout.splitlines()[-1].startswith("different: A in mt = B in mt: logits differ by at most ")


def test_verify_refuses_models_with_other_tokens(native, save_model):
    with pytest.raises(MtError, match="vocab_size: 63, but .* has 61; compare models with the same tokens"):
        mt_ckpt("verify", native, save_model("llama", vocab_size=63))
