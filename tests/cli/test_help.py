"""Help pages: plain types, groups, and an example of every command that parses."""

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from mt_cli.main import app
from mt_core.cli.help import name_type
from mt_core.cli.plugin_group import LazyCommand
from mt_core.errors import MtError

ROOT = typer.main.get_command(app)


def iterate_leaves(path: tuple[str, ...], command: Any) -> Iterator[tuple[str, ...]]:
    """The words of every command that is no group."""
    if isinstance(command, LazyCommand):
        target = command.component.load()
        command = typer.main.get_command(target) if isinstance(target, typer.Typer) else command
    if not hasattr(command, "list_commands"):
        yield path
        return
    for name in command.list_commands(typer.Context(command)):
        yield from iterate_leaves((*path, name), command.get_command(typer.Context(command), name))


LEAVES = list(iterate_leaves((), ROOT))


def read_help(*words: str) -> str:
    done = CliRunner().invoke(app, [*words, "--help"], prog_name="mt", catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def parse(words: list[str]) -> None:
    """Parse a command line as `mt` does, without running the command."""
    command: Any = ROOT
    context = ROOT.make_context("mt", words)
    while hasattr(command, "list_commands"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
        command = context.command


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_help_has_plain_types_and_examples_that_parse(words):
    shown = read_help(*words)
    assert not re.search(r"<(int|str|path|float|bool|list\[)|list\[| range\b", shown)
    _, _, after = shown.partition("\n  Example")
    examples = re.findall(r"^ +(mt .*)$", after.partition("\n\n")[0], re.MULTILINE)
    assert examples
    for example in examples:
        _, *typed = shlex.split(example.partition(" > ")[0])
        assert typed[: len(words)] == list(words)
        parse(typed)


def test_an_example_with_a_misspelt_option_would_be_found():
    with pytest.raises(Exception, match="No such option"):
        parse(["train", "--pre-set", "gpt-tiny"])


@pytest.mark.parametrize(
    ("label", "shown"),
    [("int range", "INTEGER"), ("list[Path]", "PATH"), ("fp64|fp32", "[fp64|fp32]"), ("datetime", "DATETIME")],
)
def test_a_type_has_the_name_that_command_lines_use(label, shown):
    assert name_type(label) == shown


def test_options_are_in_groups():
    titles = re.findall(r"^(\S.*):$", read_help("generate"), re.MULTILINE)
    assert [title for title in titles if not title.startswith("Options of --loader ")] == [
        "Arguments",
        "Options",
        "Checkpoint options",
        "Prompt options",
        "Draw options",
        "Beam search options",
        "Text options",
        "Model options",
        "Rank options",
        "Tokenizer options",
    ]
    assert {"Options of --loader core", "Options of --loader legacy"} <= {*titles}
    assert "\nRanks:\n  --nproc INTEGER " in read_help("train")
    assert "\nTokenizer options:\n  --tokenizer-type TEXT " in read_help("data", "preprocess")


def test_help_of_train_says_where_fields_are_documented():
    shown = " ".join(read_help("train").split())
    assert "Every field of the configuration is in docs/reference/configuration.md; mt config schema" in shown


def test_a_third_party_s_command_has_plain_types_too(add_component, tmp_path, monkeypatch):
    (tmp_path / "mt_twice.py").write_text("def twice(number: int, add: int = 0):\n    print(2 * number + add)\n")
    monkeypatch.syspath_prepend(tmp_path)
    add_component("command", "twice", "mt_twice:twice")
    assert "--add INTEGER" in read_help("twice")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--optim.lr=1e-3"], "--optim.lr=1e-3: no such option; did you mean --set optim.lr=1e-3?"),
        (["config", "show", "--optim.lr", "1"], "--optim.lr: no such option; did you mean --set optim.lr=VALUE?"),
        (["train", "optim.lr=1e-3"], "optim.lr=1e-3: no such file; did you mean --set optim.lr=1e-3?"),
        (["config", "show", "run.toml", "steps=3"], "steps=3: no such file; did you mean --set steps=3?"),
    ],
)
def test_a_setting_without_set_suggests_it(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text('preset = "gpt-tiny"\n')
    with pytest.raises(MtError) as raised:
        CliRunner().invoke(app, words, catch_exceptions=False)
    assert str(raised.value) == message
