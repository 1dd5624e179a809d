"""`mt config` and `mt --version` as a user runs them."""

import importlib.metadata
import json
import tomllib

import pytest

PRESETS = {
    "gpt-tiny": None,
    "gpt2-124m": 124_439_808,
    "gpt-345m": 354_823_168,
    "gpt3-175b": None,
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
    "smollm2-135m": 134_515_008,
}
"""Parameters, where they are published."""


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "run.toml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_the_version_is_the_package_s(mt):
    assert mt("--version").stdout == f"mt {importlib.metadata.version('mt-cli')}\n"


def test_show_prints_everything_resolved_as_toml_that_shows_the_same(mt, write):
    first = write('preset = "gpt2-124m"\n[train]\nsteps = 7\n[lr_schedule]\nwarmup_steps = 1\n')
    second = write("[train]\nsteps = 8\n", "second.toml")
    shown = mt("config", "show", first, second, "--set", "optim.lr=0.5").stdout
    config = tomllib.loads(shown)
    assert (config["model"]["layers"], config["train"]["steps"], config["optim"]["lr"]) == (12, 8, 0.5)
    assert config["lr_schedule"]["warmup_steps"] == 1
    assert config["optim"]["beta2"] == 0.95  # the preset's
    assert mt("config", "show", write(shown, "shown.toml")).stdout == shown


def test_show_does_not_ask_for_the_data_that_a_run_needs(mt, write):
    run = write('preset = "gpt-tiny"\n[data]\npaths = ["not-there-yet"]\n')
    assert mt("config", "show", run).returncode == 0
    checked = mt("config", "check", run)
    assert checked.stderr.startswith("mt: data.paths: ")
    assert checked.returncode == 2


@pytest.mark.parametrize("preset", PRESETS)
def test_check_says_what_would_be_trained(mt, preset):
    size = ("--set", "model.vocab_size=257") if preset == "gpt-tiny" else ()  # it takes the tokenizer's
    ran = mt("config", "check", "--preset", preset, *size)
    ok, parameters, _, tokens, *_ = ran.stdout.split()
    assert (ok, ran.returncode) == ("ok:", 0)
    shown = tomllib.loads(mt("config", "show", "--preset", preset).stdout)
    samples = shown["train"]["steps"] * shown["batch"]["global_batch"]
    assert int(tokens.replace(",", "")) == samples * shown["data"]["seq_length"]
    if PRESETS[preset]:
        assert int(parameters.replace(",", "")) == PRESETS[preset]


def test_two_errors_are_two_lines_and_exit_code_2(mt, write):
    run = write('preset = "gpt-tiny"\n[model]\nvocab_size = 257\nlayrs = 3\n[batch]\nmicro_batch = 0\n')
    ran = mt("config", "check", run)
    first, second = ran.stderr.splitlines()
    assert first.startswith(f"mt: {run}: model.layrs: unknown key; did you mean 'layers'? allowed: kind, layers,")
    assert second == f"mt: {run}: batch.micro_batch: 0; input should be greater than 0"
    assert (ran.stdout, ran.returncode) == ("", 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model\n", ": not TOML: "),
        ('preset = "gpt-tinny"\n', "mt: preset: unknown name 'gpt-tinny'; did you mean 'gpt-tiny'?"),
        ("", "mt: model: required, but not given; set it in a file, a preset or with --set"),
    ],
)
def test_a_file_that_cannot_be_a_configuration(mt, write, text, message):
    ran = mt("config", "show", write(text))
    assert message in ran.stderr
    assert (ran.stdout, ran.returncode) == ("", 2)


def test_a_missing_file(mt, tmp_path):
    ran = mt("config", "show", tmp_path / "run.toml")
    assert ran.stderr == f"mt: {tmp_path / 'run.toml'}: no such file; give a TOML file of settings\n"


def test_diff_prints_what_differs_presets_and_defaults_included(mt, write):
    one = write('preset = "gpt-tiny"\n[batch]\nmicro_batch = 1\n')  # the default, so no difference
    two = write('preset = "gpt-tiny"\n[optim]\nlr = 1e-5\n[log]\nsinks = ["tensorboard"]\n', "two.toml")
    assert mt("config", "diff", one, one).stdout == ""
    assert mt("config", "diff", one, two).stdout.splitlines() == [
        'log.sinks: [] -> ["tensorboard"]',
        "lr_schedule.min_lr: 0.0003 -> 1e-06",  # a tenth of optim.lr
        "optim.lr: 0.003 -> 1e-05",
    ]


def test_schema_documents_every_field(mt):
    schema = json.loads(mt("config", "schema").stdout)
    assert schema["properties"].keys() == {
        *(
            "model",
            "data",
            "batch",
            "optim",
            "train",
            "lr_schedule",
            "precision",
            "parallel",
            "pipeline",
            "recompute",
            "checkpoint",
        ),
        *("log", "runtime"),
    }
    fields = schema["$defs"]["BatchConfig"]["properties"]
    assert fields["micro_batch"]["description"] == "Sequences in one forward pass of one rank."
    assert schema["additionalProperties"] is False


def test_no_arguments_show_help_and_an_unknown_subcommand_the_nearest(mt):
    assert "show    Print the resolved configuration as TOML" in mt("config").stderr
    ran = mt("config", "shwo")
    assert "No such command 'shwo'. Did you mean 'show'" in ran.stderr
    assert ran.returncode == 2


def test_check_counts_the_tokens_of_a_growing_batch(mt):
    command = ("config", "check", "--preset", "gpt2-124m", "--set", "batch.micro_batch=1", "--set", "train.steps=6")
    said = mt(*command, "--set", 'batch.sizes="0:8 24:16"', "--set", "lr_schedule.warmup_steps=1").stdout
    assert f"{(3 * 8 + 3 * 16) * 1024:,} tokens" in said
