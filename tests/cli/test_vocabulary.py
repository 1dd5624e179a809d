"""Rows of the model for token ids, beside the tokenizer's ids: taken from it, refused below, warned of above."""

import json
import tomllib

import pytest
from typer.testing import CliRunner

from mt_cli.config import app
from mt_cli.plan.command import plan
from mt_cli.run_config import load_run_config
from mt_cli.train.run_directory import prepare_files
from mt_cli.vocabulary import find_spare_rows
from mt_core.errors import MtError

BYTES = ["data.tokenizer.type=bytes"]
FROM_TOKENIZER = [*BYTES, "model.vocab_size=tokenizer"]
"""For presets that do not ask for it themselves."""


def check(*overrides, preset="gpt-tiny"):
    options = [word for value in overrides for word in ("--set", value)]
    return CliRunner().invoke(app, ["check", "--preset", preset, *options], catch_exceptions=False)


def test_the_tokenizer_says_how_many_ids_there_are():
    numbers = ["data.tokenizer.type=NullTokenizer", "data.tokenizer.vocab_size=299"]
    for tokenizer, ids in ((BYTES, 257), (numbers, 300)):
        for preset in ("gpt-tiny", "gpt2-124m"):
            config = load_run_config([], [*tokenizer, "model.vocab_size=tokenizer"], preset)
            assert config.model.vocab_size == ids
            assert config.model.canonical_shapes()["embed.weight"][0] == ids
    shown = CliRunner().invoke(
        app, ["show", "--preset", "gpt-tiny", *(w for v in FROM_TOKENIZER for w in ("--set", v))]
    )
    assert tomllib.loads(shown.stdout)["model"]["vocab_size"] == 257


def test_without_a_tokenizer_a_run_and_a_plan_need_the_number():
    message = (
        "preset gpt-tiny: model.vocab_size: 'tokenizer', but the run has no tokenizer; "
        "name it in data.tokenizer, or say how many ids there are: --set model.vocab_size=N"
    )
    for load in (check, lambda: plan(gpus=1, preset="gpt-tiny")):
        with pytest.raises(MtError) as error:
            load()
        assert str(error.value) == message
    with pytest.raises(MtError) as error:
        check("model.layrs=3", "batch.micro_batch=0")
    assert len(error.value.problems) == 3
    assert str(error.value).endswith(message), "all that is wrong is told at once"


def test_looking_at_a_configuration_needs_no_tokenizer(tmp_path):
    (tmp_path / "run.toml").write_text('preset = "gpt-tiny"\n[data.tokenizer]\nvocab_file = "gone.json"\n')
    for words in (["show", "--preset", "gpt-tiny"], ["show", str(tmp_path / "run.toml")]):
        shown = CliRunner().invoke(app, words, catch_exceptions=False).stdout
        assert tomllib.loads(shown)["model"]["vocab_size"] == "tokenizer"
    words = ["diff", str(tmp_path / "run.toml"), str(tmp_path / "run.toml")]
    assert CliRunner().invoke(app, words, catch_exceptions=False).output == ""


@pytest.mark.slow
def test_verify_needs_no_tokenizer(mt):
    made = mt("verify", "--preset", "gpt-tiny", "--layout", "tensor=2", "--steps", "1", "--json")
    assert json.loads(made.stdout)["agrees"] is True


def test_what_is_wrong_with_the_tokenizer_is_told_once(tmp_path):
    with pytest.raises(MtError) as error:
        load_run_config([], ["model.vocab_size=tokenizer", "data.tokenizer.model=gone.json"], "gpt-tiny", rules=False)
    assert str(error.value) == "data.tokenizer.model: no file gone.json; nothing in . has a name like it"
    with pytest.raises(MtError) as error:
        load_run_config([], ["model.vocab_size=tokenizer", "data.tokenizer.modell=x"], "gpt-tiny")
    assert [str(problem).partition(";")[0] for problem in error.value.problems] == [
        "--set: data.tokenizer.modell: unknown key"
    ]
    (tmp_path / "tokenizer.json").write_text("{}")
    broken = ["data.tokenizer.type=HuggingFaceTokenizer", f"data.tokenizer.model={tmp_path}"]
    with pytest.raises(MtError) as error:
        load_run_config([], broken, "gpt-tiny")
    assert len(error.value.problems) == 1
    assert "tokenizer.json: is not a tokenizer.json" in str(error.value)


def test_fewer_rows_than_ids_are_refused_before_the_start():
    with pytest.raises(MtError) as error:
        check(*BYTES, "model.vocab_size=100")
    assert str(error.value) == (
        'model.vocab_size: 100 rows, but the tokenizer has 257 ids; allowed: 257, more, or "tokenizer"; '
        "or another tokenizer"
    )
    assert check(*BYTES, "model.vocab_size=257").stderr == ""


def test_rows_beyond_ids_and_padding_are_warned_of_at_check_and_start(tmp_path):
    warning = 'model.vocab_size: 4,096 rows, but the tokenizer has 257 ids; "tokenizer" takes as many as there are ids'
    values = (*BYTES, "model.vocab_size=4096")
    result = check(*values)
    assert (result.exit_code, result.stderr) == (0, f"mt: warning: {warning}\n")
    assert result.stdout.startswith("ok: ")
    assert check(*BYTES, "model.vocab_size=1024").stderr == "", "padding for 8 tensor ranks"
    assert check(*FROM_TOKENIZER).stderr == ""


def test_a_start_warns_and_a_resume_does_not(tmp_path, capsys):
    config = load_run_config([], [*BYTES, "model.vocab_size=4096", f"runtime.run_dir={tmp_path}"], "gpt-tiny")
    prepare_files(tmp_path, config, resumed=True)
    assert capsys.readouterr().err == ""
    prepare_files(tmp_path, config, resumed=False)
    assert capsys.readouterr().err.startswith(
        "mt: warning: model.vocab_size: 4,096 rows, but the tokenizer has 257 ids"
    )
    init = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"init": "native:run"})})
    assert list(find_spare_rows(init)) == [], "the checkpoint decides the rows"
