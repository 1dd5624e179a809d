"""Writes docs/reference/commands.md from the help of every command.

usage: python docs/commands_reference.py
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from mt_cli.main import app
from mt_core.cli.plugin_group import LazyCommand

PAGE = Path(__file__).parent / "reference" / "commands.md"
INTRO = """# Commands

<!-- Written by docs/commands_reference.py; a test compares. -->

What `--help` prints. Results go to stdout; progress, notes and errors to stderr.
[Exit codes](errors.md#exit-codes). Commands of plugins appear in `mt --help` beside these.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([INTRO, *(text for path in paths((), typer.main.get_command(app)) for text in entry(path))])


def paths(path: tuple[str, ...], command: Any) -> Iterator[tuple[str, ...]]:
    """A command and all commands below it, as the words that follow `mt`."""
    yield path
    if isinstance(command, LazyCommand):
        target = command.component.load()
        if not isinstance(target, typer.Typer):
            return
        command = typer.main.get_command(target)
    for name in command.list_commands(None) if hasattr(command, "list_commands") else ():
        yield from paths((*path, name), command.get_command(None, name))


def entry(path: tuple[str, ...]) -> Iterator[str]:
    """A heading and the help of one command."""
    yield f"## {' '.join(('mt', *path))}\n"
    result = CliRunner(env=os.environ | {"COLUMNS": "100"}).invoke(app, [*path, "--help"], prog_name="mt")
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    yield "\n".join(["```text", *lines, "```", ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
