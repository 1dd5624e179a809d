"""`mt plan` as a user runs it; without torch."""

import json
import shlex
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


def test_a_batch_that_grows_is_told_and_every_size_must_pass(mt, config):
    words = ("--gpus", 8, "--set", "parallel.pipeline=2", "--set", "parallel.tensor=2")
    words += ("--set", "batch.rampup=[4, 4, 30]")
    shown = mt("plan", config, *words).stdout
    assert "\n           grown from 4 = 2 × 1 by 4 over 30 samples, 5 steps\n" in shown
    assert "dualpipev               2 microbatches, but dualpipev needs at least 2 × 2 ranks;" in shown
    ran = mt("plan", config, *words, "--schedule", "dualpipev")
    assert ran.returncode == 2
    assert ran.stderr == (
        "mt: batch.rampup: 2 microbatches, but dualpipev needs at least 2 × 2 ranks; allowed: 4 microbatches, "
        "batch.global_batch = 8\n"
    )
    ran = mt("plan", config, "--gpus", 8, "--set", "batch.rampup=[3, 1, 30]")
    assert ran.stderr.startswith("mt: batch.rampup: 3, 5, 7, …: no multiple of micro_batch 1 × data 2; allowed: ")


def test_one_gpu_needs_no_communication(mt):
    shown = mt("plan", "--preset", "gpt2-124m", "--gpus", 1).stdout
    assert "\nno communication\n" in shown
    assert "on 1 data rank\n" in shown


def test_latent_attention_and_experts_after_a_dense_layer_are_planned(mt):
    words = ("--set", "parallel.expert=8", "--set", "parallel.sharding=zero1", "--set", "parallel.tensor=2")
    shown = mt("plan", "--preset", "deepseek-v2-lite", "--gpus", 64, "--set", "parallel.sequence=true", *words).stdout
    assert shown.startswith("model      15,706,484,224 parameters, 27 layers, bf16\n")
    assert " expert all-to-all " in shown
    assert " fits, " in shown


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


@pytest.mark.slow
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


PIPELINE = ("--set", "parallel.pipeline=2", "--set", "parallel.tensor=2")


def test_a_pipeline_is_planned_and_all_schedules_compared(mt, blocking, config):
    ran = mt("plan", config, "--gpus", 8, *PIPELINE, PYTHONPATH=blocking("torch", "numpy"))
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = ran.stdout.splitlines()
    assert lines[1:4] == [
        "layout     tensor 2 + sequence × context 1 × data 2 × pipeline 2 = 8 nvidia-h200; zero1 over 2; no recompute",
        "batch      16 × 8,192 tokens = 8 × 1 on 2 data ranks",
        "pipeline   2 ranks: 1F1B, Et*16|t*16L",
    ]
    start = next(number for number, line in enumerate(lines) if line.startswith("schedules "))
    assert [line[:24].strip() for line in lines[start + 1 : start + 9]] == [
        "gpipe", "* 1f1b", "interleaved, 2 stages", "interleaved, 4 stages", "zb-h1", "zb-2p", "zbv", "dualpipev",
    ]  # fmt: skip
    assert lines[start + 9].startswith("  recommended: --set pipeline.schedule=")
    assert any(line.startswith("  pipeline send ") for line in lines)
    assert any(line.startswith("  waiting for other stages ") for line in lines)


def test_a_pipeline_as_json_and_as_a_picture(mt, config, tmp_path):
    words = ("--schedule", "zbv", "--picture", tmp_path / "new" / "out.svg", "--json")
    ran = mt("plan", config, "--gpus", 8, *PIPELINE, *words)
    assert ran.returncode == 0, ran.stderr
    values = json.loads(ran.stdout)
    pipeline = values["pipeline"]
    assert (pipeline["schedule"], pipeline["virtual_stages"], pipeline["microbatches"]) == ("zbv", 2, 8)
    assert pipeline["layout"] == "Et*8|t*8|t*8|t*8L"
    assert len(pipeline["peak_activations"]) == len(pipeline["totals"]) == 2
    assert [each["schedule"] for each in pipeline["schedules"]].count("interleaved") == 2
    chosen = next(each for each in pipeline["schedules"] if each["schedule"] == "zbv")
    assert chosen == {key: pipeline[key] for key in chosen}
    assert pipeline["recommended"]["set"][0].startswith("pipeline.schedule=")
    assert values["layout"]["pipeline"] == 2
    assert values["memory"]["total"] == max(pipeline["totals"])
    assert values["step"]["seconds"] == pytest.approx(sum(values["step"]["parts"].values()))
    tokens = 16 * 8192 / values["step"]["seconds"] / 8
    assert values["step"]["tokens_per_s_per_gpu"] == pytest.approx(tokens)
    picture = ElementTree.fromstring((tmp_path / "new" / "out.svg").read_text())
    (title,) = picture.findall("{http://www.w3.org/2000/svg}title")
    assert title.text == f"zbv on 8 × nvidia-h200, 8 microbatches: bubble {pipeline['bubble'] * 100:.1f}%"


def test_a_picture_of_a_pipeline_needs_a_directory_too(mt, config, tmp_path):
    (tmp_path / "file").touch()
    ran = mt("plan", config, "--gpus", 8, *PIPELINE, "--picture", tmp_path / "file" / "out.svg")
    assert ran.returncode == 2
    assert "is a file, not a directory" in ran.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--schedule", "zbv"),
            "mt: pipeline.schedule: 'zbv', but parallel.pipeline is 1; leave it out, or set parallel.pipeline above 1",
        ),
        (("--picture", "out.svg"), "mt: --picture: draws a pipeline, and parallel.pipeline is 1; use --svg, or set it"),
        (
            (*PIPELINE, "--svg", "x"),
            "mt: --svg: draws ranks that are alike, which those of a pipeline are not; use --p",
        ),
        (
            (*PIPELINE, "--schedule", "zb"),
            "mt: --set: pipeline.schedule: 'zb'; input should be 'gpipe', '1f1b', 'inter",
        ),
        (("--set", "parallel.pipeline=3"), "mt: parallel.pipeline: 3 does not divide 8 GPUs; allowed: 1, 2, 4, 8\n"),
        (
            (*PIPELINE, "--schedule", "dualpipev", "--set", "batch.global_batch=6"),
            "mt: batch.global_batch: 3 microbatches, but dualpipev needs at least 2 × 2 ranks; allowed: 4 "
            "microbatches, batch.global_batch = 8\n",
        ),
        (
            (*PIPELINE, "--set", "pipeline.layout=Et*16|x"),
            "mt: pipeline.layout: 'Et*16|>x<': 'x' at position 7 is no letter of a layout; allowed: E, t, L, |, *, ",
        ),
    ],
)
def test_what_a_pipeline_cannot_be_is_refused(mt, config, words, message):
    ran = mt("plan", config, "--gpus", 8, *words)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith(message)


def test_a_pipeline_that_does_not_fit_ends_with_1(mt, config):
    ran = mt("plan", config, "--gpus", 8, *PIPELINE, "--memory-gib", 20)
    assert ran.returncode == 1
    assert ran.stderr.startswith("mt: does not fit: ")
    assert "(none fits; this one needs least memory)" in ran.stdout


def test_stages_of_equal_time_are_named_for_the_shell(mt, config):
    words = ("--set", "parallel.pipeline=4", "--set", "parallel.tensor=1", "--set", "parallel.sequence=false")
    values = json.loads(mt("plan", config, "--gpus", 8, *words, "--json").stdout)["pipeline"]
    balanced = values["balanced"]
    assert balanced["set"] == [*values["recommended"]["set"], f'pipeline.layout="{balanced["layout"]}"']
    shown = mt("plan", config, "--gpus", 8, *words).stdout
    (line,) = [line for line in shown.splitlines() if line.startswith("  with stages of equal time: ")]
    options = shlex.split(line.partition(": ")[2].rpartition(" (")[0])
    again = json.loads(mt("plan", config, "--gpus", 8, *words, *options, "--json").stdout)["pipeline"]
    assert again["seconds"] == balanced["seconds"]
    assert again["layout"] == balanced["layout"]


def test_times_to_order_passes_by_are_named_for_the_shell(mt):
    words = ("--preset", "gemma-2-2b", "--set", "parallel.pipeline=2", "--set", "batch.global_batch=16")
    values = json.loads(mt("plan", "--gpus", 2, *words, "--json").stdout)["pipeline"]
    assert values["ordered"]["set"][:-1] == values["balanced"]["set"]
    assert values["ordered"]["seconds"] < values["balanced"]["seconds"]
    shown = mt("plan", "--gpus", 2, *words).stdout
    (line,) = [line for line in shown.splitlines() if line.startswith("  with passes ordered by their times: ")]
    options = shlex.split(line.partition(": ")[2].rpartition(" (")[0])
    again = json.loads(mt("plan", "--gpus", 2, *words, *options, "--json").stdout)["pipeline"]
    assert again["seconds"] == values["ordered"]["seconds"]
