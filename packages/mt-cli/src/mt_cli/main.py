"""`mt`: finds the installed packages' commands and runs one."""

import sys

import typer

from mt_core.cli.plugin_group import plugin_group
from mt_core.errors import EXIT_USER_ERROR, MtError

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
    """Entry point. A mistake of the user's is reported in one line a problem, with exit code 2."""
    try:
        app()
    except MtError as err:
        for problem in err.problems:
            print(f"mt{_rank_label()}: {problem}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from None
