"""`mt plan` as a user runs it; without torch."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

RUN = """
preset = "llama3-8b"
[batch]
global_batch = 16
[parallel]
tensor = 4
sequence = true
sharding = "zero1"
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path / "run.toml"


def test_a_plan_says_what_a_gpu_holds_sends_and_takes_without_torch(mt, blocking, config):
    ran = mt("plan", config, "--gpus", 8, PYTHONPATH=blocking("torch", "numpy"))
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = ran.stdout.splitlines()
    assert lines[:3] == [
        "model      8,030,261,248 parameters, 32 layers, bf16",
        "layout     tensor 4 + sequence × context 1 × data 2 = 8 nvidia-h200; zero1 over 2; no recompute",
        "batch      16 × 8,192 tokens = 8 × 1 on 2 data ranks",
    ]
    assert ["weights", "3.74"] in [line.split() for line in lines]
    assert any(line.startswith("  total ") and "of 139.8: fits, 101.1 left" in line for line in lines)
    assert any(line.startswith("  tensor all-gather ") for line in lines)
    assert any(
        line.startswith("  data reduce-scatter ") and line.endswith("(beside last backward pass)") for line in lines
    )
    assert any(line.startswith("  waiting for tensor ") for line in lines)
    assert lines[-1] == "--explain lists every item and all assumptions"


def test_a_growing_batch_is_planned_at_its_largest(mt, config):
    words = ("--gpus", 8, "--set", "batch.global_batch=1", "--set", 'batch.sizes="0:4 1M:32"')
    assert "\nbatch      32 × 8,192 tokens = 16 × 1 on 2 data ranks\n" in mt("plan", config, *words).stdout
    assert "mt: batch.sizes: '0:4 x'; steps as" in mt("plan", config, *words, "--set", "batch.sizes=0:4 x").stderr


def test_one_gpu_needs_no_communication(mt):
    shown = mt("plan", "--preset", "gpt2-124m", "--gpus", 1).stdout
    assert "\nno communication\n" in shown
    assert "on 1 data rank\n" in shown


def test_explain_lists_items_and_assumptions(mt, config):
    shown = mt("plan", config, "--gpus", 8, "--explain").stdout
    assert "    Adam's two moments " in shown
    assert "\nassumptions\n  Adam with fp32 moments" in shown
    assert "Of profile nvidia-h200, assumed and not measured: gpus_per_node, network_gb_s." in shown


def test_json_carries_everything(mt, config):
    values = json.loads(mt("plan", config, "--gpus", 8, "--json").stdout)
    assert values["layout"]["data"] == 2
    assert values["memory"]["total"] == pytest.approx(sum(values["memory"]["categories"].values()))
    assert values["memory"]["total"] == pytest.approx(sum(item["bytes"] for item in values["memory"]["items"]))
    assert values["step"]["seconds"] == pytest.approx(sum(values["step"]["parts"].values()))
    assert {row["axis"] for row in values["communication"]} == {"tensor", "data"}
    assert values["profile"]["name"] == "nvidia-h200"
    assert values["advice"] == []
    assert len(values["assumptions"]) > 5


def test_pictures_are_written(mt, config, tmp_path):
    ran = mt("plan", config, "--gpus", 8, "--svg", tmp_path / "new" / "pictures")
    assert ran.returncode == 0, ran.stderr
    pictures = sorted((tmp_path / "new" / "pictures").iterdir())
    assert [path.name for path in pictures] == ["memory.svg", "timeline.svg"]
    assert all(ElementTree.fromstring(path.read_text()).tag.endswith("svg") for path in pictures)


def test_a_picture_needs_a_directory(mt, config, tmp_path):
    (tmp_path / "file").touch()
    ran = mt("plan", config, "--gpus", 8, "--svg", tmp_path / "file")
    assert ran.returncode == 2
    assert "a part of this path is a file, not a directory" in ran.stderr


def test_what_does_not_fit_is_told_with_what_would(mt, config):
    ran = mt("plan", config, "--gpus", 8, "--memory-gib", 30)
    shown = ran.stdout
    assert (ran.returncode, ran.stderr) == (1, "mt: does not fit: 38.7 GiB of 30.0 on each GPU\n")
    assert " of 30.0: does not fit, 8.7 too much\n" in shown
    assert "\nwhat fits on 8 " in shown
    assert "  --set parallel.tensor=8 --set parallel.data=1\n" in shown
    ran = mt("plan", config, "--gpus", 8, "--memory-gib", 30, "--json")
    assert ran.returncode == 1
    values = json.loads(ran.stdout)
    assert (values["memory"]["fits"], values["memory"]["reason"]) == (False, "38.7 GiB of 30.0 on each GPU")
    assert values["advice"][0]["set"] == ["parallel.tensor=8", "parallel.data=1"]
    assert values["advice"][0]["bytes"] <= 30 * 2**30


def test_more_gpus_are_named_when_nothing_else_helps(mt):
    words = ("--preset", "gpt3-175b", "--set", "batch.global_batch=64")
    shown = mt("plan", *words, "--gpus", 8).stdout
    assert "\nnothing near it fits; but on 32 " in shown
    assert json.loads(mt("plan", *words, "--gpus", 8, "--json").stdout)["advice"][0]["gpus"] == 32


def test_what_never_fits_is_told_too(mt):
    words = ("--preset", "gpt3-175b", "--set", "batch.global_batch=1")
    shown = mt("plan", *words, "--gpus", 1, "--memory-gib", 4).stdout
    assert "\nnothing near it fits, on 1 or many times as many GPUs\n" in shown


def test_an_impossible_layout_is_refused_with_the_nearest(mt, config):
    ran = mt("plan", config, "--gpus", 8, "--set", "parallel.tensor=3")
    assert ran.returncode == 2
    assert ran.stdout == ""
    lines = ran.stderr.splitlines()
    assert lines[0].startswith("mt: parallel: tensor 3 × context 1 does not make 8 ranks")
    assert lines[-1] == (
        "mt: parallel: this layout cannot run on 8 ranks; nearest that pass: "
        "tensor 4 + sequence × context 1 × data 2; tensor 2 + sequence × context 1 × data 4; "
        "tensor 2 + sequence × context 2 × data 2"
    )


def test_a_profile_is_a_name_or_a_file(mt, config, tmp_path):
    ran = mt("plan", config, "--gpus", 8, "--profile", "nvidia-h20")
    assert ran.returncode == 2
    assert ran.stderr.startswith("mt: --profile: unknown profile 'nvidia-h20'; did you mean 'nvidia-h200'?")
    assert ran.stderr.endswith(" allowed: nvidia-h200, or a FILE.toml\n")
    ran = mt("plan", config, "--gpus", 8, "--profile", tmp_path / "none.toml")
    assert "none.toml: no such file" in ran.stderr
