"""Options that a dataclass declares; those of plugins are tested in tests/ckpt/conversion/test_plugin_options.py."""

from dataclasses import dataclass
from typing import Annotated

import pytest
from typer import Option, Typer
from typer.testing import CliRunner

from mt_core.cli.options import MultiValueCommand, expand_options


@dataclass(frozen=True)
class Address:
    city: Annotated[str, "Where."]
    floor: Annotated[int, Option(min=0, help="How high.")] = 3


@pytest.fixture
def app():
    return Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


def run(app, *words):
    return CliRunner().invoke(app, words, catch_exceptions=False)


def test_a_dataclass_is_one_option_a_field(app):
    calls = []

    @app.command()
    @expand_options
    def go(address: Address, loud: bool = False) -> None:
        calls.append((address, loud))

    assert run(app, "--city", "Oslo", "--loud").exit_code == 0
    assert calls == [(Address("Oslo", 3), True)]


def test_the_text_of_a_field_is_its_help_and_typers_own_option_says_more(app):
    app.command()(expand_options(show))
    lines = [" ".join(line.split()) for line in run(app, "--help").stdout.splitlines()]
    assert "--city <str> Where. [required]" in lines
    assert "--floor <int range> How high. [default: 3; x>=0]" in lines
    refused = run(app, "--city", "Oslo", "--floor", "-1").stderr
    assert "Invalid value for '--floor': Input should be greater than or equal to 0" in refused


def show(address: Address) -> None:
    """Print an address."""
    print(address)


def test_an_option_that_the_command_has_itself_stays_the_commands(app):
    calls = []

    @app.command()
    @expand_options
    def go(*, floor: int = 1, address: Address) -> None:
        calls.append((floor, address))

    assert run(app, "--city", "Oslo", "--floor", "7").exit_code == 0
    assert calls == [(7, Address("Oslo", 3))]


def test_a_group_may_be_named_as_one_of_its_fields(app):
    calls = []

    @app.command()
    @expand_options
    def go(city: Address) -> None:
        calls.append(city)

    assert run(app, "--city", "Oslo").exit_code == 0
    assert calls == [Address("Oslo", 3)]


def test_list_options_take_several_values_at_once(app):
    @app.command(cls=MultiValueCommand)
    def go(names: Annotated[list[str], Option()], size: int = 0) -> None:
        print(names, size)

    assert run(app, "--names", "a", "b", "--size", "2", "--names", "c").stdout == "['a', 'b', 'c'] 2\n"
