"""`mt ckpt average` and `prune`."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mt_ckpt.command import app
from mt_ckpt.conversion.convert import convert
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.checkpoint.native import locked_for_reading, read_meta, step_directory, steps
from mt_core.checkpoint.step_writer import write
from mt_core.errors import MtError


def mt_ckpt(*args):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def changed(path, target, change):
    """A copy of a Hugging Face directory whose tensors went through `change`."""
    convert("hf", path, "hf", target)
    tensors = load_file(target / "model.safetensors")
    save_file({name: change(t) for name, t in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.fixture
def pair(save_model, tmp_path):
    first = save_model("llama")
    return first, changed(first, tmp_path / "second", lambda tensor: -3 * tensor)


def test_the_mean_of_two_is_written_in_any_format(pair, tmp_path):
    result = mt_ckpt("average", *pair, "--save-dir", tmp_path / "mean", "--saver", "hf")
    assert result.stdout == f"wrote {tmp_path / 'mean'}: 30 tensors, the mean of 2 checkpoints\n"
    before, mean = (load_file(path / "model.safetensors") for path in (pair[0], tmp_path / "mean"))
    for name, tensor in before.items():
        assert torch.equal(mean[name], 0.5 * tensor + 0.5 * (-3 * tensor))


def test_weights_are_divided_by_their_sum(pair, tmp_path):
    mt_ckpt("average", *pair, "--save-dir", tmp_path / "mean", "--weights", "6,2")
    before, mean = (dict(open_checkpoint(path).tensors()) for path in (pair[0], tmp_path / "mean"))
    assert before.keys() == mean.keys()
    for name, tensor in before.items():
        assert torch.equal(mean[name], 0.75 * tensor + 0.25 * (-3 * tensor))


def test_bf16_is_summed_in_fp32_and_rounded_once(save_model, tmp_path):
    first = save_model("llama", dtype=torch.bfloat16)
    others = [changed(first, tmp_path / f"{i}", lambda tensor, i=i: tensor * (1 + i / 100)) for i in range(1, 4)]
    mt_ckpt("average", first, *others, "--save-dir", tmp_path / "mean", "--saver", "hf")
    all_of_them = [load_file(path / "model.safetensors")["model.norm.weight"] for path in (first, *others)]
    exact = torch.stack([tensor.double() for tensor in all_of_them]).mean(0).bfloat16()
    assert torch.equal(load_file(tmp_path / "mean" / "model.safetensors")["model.norm.weight"], exact)


def test_other_configurations_are_refused_with_every_difference(pair, save_model, tmp_path):
    other = save_model("mistral", num_hidden_layers=2, vocab_size=63)
    with pytest.raises(MtError) as error:
        mt_ckpt("average", pair[0], other, "--save-dir", tmp_path / "mean")
    assert f"{other}: layers: 2, but {pair[0]} has 3; average checkpoints of one model" in str(error.value)
    assert f"{other}: vocab_size: 63, but {pair[0]} has 61" in str(error.value)
    assert not (tmp_path / "mean").exists()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("1,2,3", "--weights: 3 weights for 2 checkpoints; give one for each"),
        ("1,x", "--weights: '1,x'; give numbers with commas between"),
        ("1,-1", "--weights: their sum is 0; it must be above 0"),
    ],
)
def test_weights_that_make_no_mean_are_refused(weights, message, pair, tmp_path):
    with pytest.raises(MtError, match=message):
        mt_ckpt("average", *pair, "--save-dir", tmp_path / "mean", "--weights", weights)


def test_one_checkpoint_has_no_mean(pair, tmp_path):
    with pytest.raises(MtError, match="one checkpoint; give two or more"):
        mt_ckpt("average", pair[0], "--save-dir", tmp_path / "mean")


def test_missing_tensors_of_a_checkpoint_are_named_at_once(pair, tmp_path):
    convert("hf", pair[0], "native", tmp_path / "a")
    config = read_meta(step_directory(tmp_path / "a", 0))["config"]["model"]
    lacking = ("norm.weight", "head.weight")
    tensors = [pair for pair in open_checkpoint(tmp_path / "a").tensors() if pair[0] not in lacking]
    meta = {"step": 0, "samples": 0, "tokens": 0, "config": {"model": config}}
    write(step_directory(tmp_path / "b", 0), {"model": tensors}, meta)
    with pytest.raises(MtError) as error:
        mt_ckpt("average", tmp_path / "a", tmp_path / "b", "--save-dir", tmp_path / "mean")
    assert {f"{p.where}: {p.actual}" for p in error.value.problems} == {
        f"{tmp_path / 'b'}: {name}: tensor is missing" for name in lacking
    }
    assert not (tmp_path / "mean").exists()


@pytest.fixture
def run(tmp_path):
    for step in (10, 20, 30):
        meta = {"step": step, "samples": 0, "tokens": 0, "config": {"model": {}}}
        write(step_directory(tmp_path / "run", step), {"model": [("a", torch.zeros(2))]}, meta)
    return tmp_path / "run"


def test_prune_keeps_the_newest_steps(run):
    result = mt_ckpt("prune", run, "--keep", 2)
    assert result.stdout == "removed: step-00000010\nkept: step-00000020, step-00000030\n"
    assert [path.name for path in steps(run)] == ["step-00000020", "step-00000030"]


def test_prune_leaves_a_step_that_is_being_read(run):
    with locked_for_reading(step_directory(run, 20)):
        result = mt_ckpt("prune", run, "--keep", 1)
    assert result.stdout == "removed: step-00000010\nkept: step-00000020, step-00000030\n"


def test_prune_keeps_at_least_one(run):
    assert mt_ckpt("prune", run, "--keep", 0).exit_code == 2
    assert len(steps(run)) == 3


def test_prune_of_no_run_is_refused(tmp_path):
    with pytest.raises(MtError, match="holds no committed steps; give a run directory"):
        mt_ckpt("prune", tmp_path, "--keep", 1)
