"""`mt train RUN.toml`: in this process on one device, or as several ranks with --nproc."""

from pathlib import Path
from typing import Annotated

import typer

from mt_cli.completion import preset_names


def train(
    files: Annotated[
        list[Path] | None, typer.Argument(help="TOML files; later ones override earlier ones.", show_default=False)
    ] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override one: section.field=value.")] = None,
    preset: Annotated[str | None, typer.Option(help="Start from this preset.", autocompletion=preset_names)] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Ranks to start on this machine, one a device.")] = 1,
) -> None:
    """Train a model. Resumes from the run directory's latest checkpoint; SIGTERM and Ctrl-C save one first."""
    from mt_cli.run_config import load_run_config

    ranks = [] if nproc == 1 else [f"parallel.data={nproc}"]
    config = load_run_config(files or [], [*(overrides or []), *ranks], preset)
    from mt_core.parallel.launch import launch, launched

    if nproc > 1 and not launched():
        options = [part for text in [*(overrides or []), *ranks] for part in ("--set", text)]
        options += ["--preset", preset] if preset else []
        raise typer.Exit(launch(["-m", "mt_cli", "train", *map(str, files or []), *options], nproc))
    from mt_cli.train.compose import run

    raise typer.Exit(run(config))
