"""Old keys of a configuration are refused with their new names; checkpoints saved with them stay readable."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest
import torch

from mt_ckpt.conversion.convert import convert
from mt_ckpt.megatron.training_state.read_native import read_native
from mt_cli.run_config import load_run_config
from mt_cli.train.compose import run
from mt_core.checkpoint import native
from mt_core.config.loading import read_toml
from mt_core.config.renamed_keys import RENAMED, find_renamed, translate
from mt_core.errors import MtError
from tiny import metrics

GOLDEN = Path(__file__).parent / "golden_0_1"
KINDS = ("dense", "moe")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def current_toml(kind: str, path: Path, run_dir: Path) -> Path:
    """The golden run's settings in today's keys."""
    import tomli_w

    values = translate(tomllib.loads((GOLDEN / f"{kind}.toml").read_text()))
    values["runtime"]["run_dir"] = str(run_dir)
    path.write_text(tomli_w.dumps(values))
    return path


def test_the_golden_runs_have_every_old_key_that_mt_wrote():
    config = json.loads((GOLDEN / "moe/step-00000002/meta.json").read_text())["config"]
    assert dict(find_renamed(config)) == RENAMED
    assert not dict(find_renamed(translate(config)))
    assert "schedule" not in translate(config)


def test_every_old_key_is_refused_with_its_new_name_and_nothing_else_is(kind):
    path = GOLDEN / kind / "config.toml"
    old = dict(find_renamed(read_toml(path).values))
    with pytest.raises(MtError) as caught:
        load_run_config([path])
    lines = [f"{path}: {key}: unknown key; did you mean '{new}'?" for key, new in old.items()]
    assert str(caught.value).splitlines() == lines


def test_an_old_key_of_an_override_is_refused_as_the_override(tmp_path):
    with pytest.raises(MtError) as caught:
        load_run_config([], ["schedule.steps=3"], "gpt-tiny", rules=False)
    assert str(caught.value).splitlines()[0] == "--set: schedule.steps: unknown key; did you mean 'train.steps'?"


def test_what_the_user_wrote_comes_before_what_is_missing():
    with pytest.raises(MtError) as caught:
        load_run_config([], ["a=1"])
    first, *others = str(caught.value).splitlines()
    assert first.startswith("--set: a: unknown key; ")
    assert [line.split(";")[0] for line in others] == [f"{name}: required, but not given" for name in ("model", "data")]


def test_a_model_of_another_package_may_have_a_field_of_an_old_name():
    values = {"model": {"kind": "mamba", "model_size": 8}, "schedule": {"steps": 2}}
    assert dict(find_renamed(values)) == {"schedule.steps": "train.steps"}
    assert translate(values) == {"model": values["model"], "train": {"steps": 2}}


def test_a_new_key_wins_over_the_old_one():
    assert translate({"schedule": {"steps": 2, "x": 1}, "train": {"steps": 3}}) == {
        "schedule": {"x": 1},
        "train": {"steps": 3},
    }


def test_a_checkpoint_with_old_keys_is_read_in_todays(kind, tmp_path):
    state = read_native(GOLDEN / kind)
    assert state.config.hidden_size == 4
    assert state.config.max_seq_len == 16
    assert state.config.attention.num_kv_heads == 1
    assert state.config.mlp.ffn_hidden_size == 4
    assert state.args["train_iters"] == 2
    assert state.args["lr_warmup_iters"] == 1
    assert state.iteration == 2
    assert {name for name, _ in state.weights()} == {*state.config.canonical_shapes()}


def test_a_checkpoint_with_old_keys_converts(kind, tmp_path):
    convert("native", GOLDEN / kind, "native", tmp_path / "converted")
    step = native.step_directory(tmp_path / "converted", 0)
    assert "model_size" not in (step / native.META).read_text()
    ours, theirs = (dict(native.stream(path)) for path in (step, GOLDEN / kind / "step-00000002"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_with_old_keys_goes_on_as_the_code_that_saved_it_did(kind, tmp_path):
    shutil.copytree(GOLDEN / kind, tmp_path / "run")
    toml = current_toml(kind, tmp_path / "run.toml", tmp_path / "run")
    assert run(load_run_config([toml], ["train.steps=4"])) == 0
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert losses[2:] == pytest.approx(json.loads((GOLDEN / "next_losses.json").read_text())[kind], rel=1e-6)
    saved = load_run_config([tmp_path / "run/config-00000002.toml"])
    assert saved.train.steps == 4
