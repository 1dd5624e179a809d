"""Writes docs/reference/commands.md from the help of every command.

usage: python tools/docs/commands_reference.py
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from mt_cli.main import app
from mt_core.cli.plugin_group import LazyCommand

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "commands.md"
INTRO = """# Commands

<!-- Written by tools/docs/commands_reference.py; a test compares. -->

What `--help` prints. Results go to stdout; progress, notes and errors to stderr.
[Exit codes](errors.md#exit-codes). Commands of plugins appear in `mt --help` beside these.
"""


def render_page() -> str:
    """Return the text of the page."""
    return "\n".join(
        [INTRO, *(text for path in iterate_commands((), typer.main.get_command(app)) for text in render_entry(path))]
    )


def iterate_commands(path: tuple[str, ...], command: Any) -> Iterator[tuple[str, ...]]:
    """Yield a command and all commands below it, as the words that follow `mt`."""
    yield path
    if isinstance(command, LazyCommand):
        target = command.component.load()
        if not isinstance(target, typer.Typer):
            return
        command = typer.main.get_command(target)
    for name in command.list_commands(None) if hasattr(command, "list_commands") else ():
        yield from iterate_commands((*path, name), command.get_command(None, name))


def render_entry(path: tuple[str, ...]) -> Iterator[str]:
    """Yield a heading and the help of one command."""
    yield f"## {' '.join(('mt', *path))}\n"
    result = CliRunner(env=os.environ | {"COLUMNS": "100"}).invoke(app, [*path, "--help"], prog_name="mt")
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    yield "\n".join(["```text", *lines, "```", ""])


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")
