"""`mt`: finds the installed packages' commands and runs one."""

import io
import sys
from typing import NoReturn

import typer

from mt_core.cli.plugin_group import plugin_group
from mt_core.errors import MtError
from mt_core.files import describe_file_error

app = plugin_group("command", "Train, convert and evaluate language models.", completion=True)


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"mt {version('mt-cli')}")
        raise typer.Exit


@app.callback()
def _mt(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Train, convert and evaluate language models."""


def _rank_label() -> str:
    launch = sys.modules.get("mt_core.distributed.process_group")  # torch; imported already wherever there are ranks
    return launch.rank_label() if launch else ""


def main() -> None:
    """Entry point. An `MtError` is reported in one line a problem; its exit code is 2 for a mistake of the user's."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files and texts need not fit the terminal's encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except MtError as err:
        _report(err)
    except OSError as err:
        if (problem := describe_file_error(err)) is None:
            raise
        _report(problem)


def _report(error: MtError) -> NoReturn:
    for problem in error.problems:
        print(f"mt{_rank_label()}: {problem}", file=sys.stderr)
    raise SystemExit(error.exit_code) from None
