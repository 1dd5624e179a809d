"""`mt train RUN.toml`: in this process on one device, or as several ranks with --nproc."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mt_cli.options import CONFIGURATION, Files, Overrides, Preset


def train(
    files: Files = None,
    overrides: Overrides = None,
    preset: Preset = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Train on this text (.txt, .jsonl, …): it is tokenized, and a small preset chosen if none is named.",
            rich_help_panel=CONFIGURATION,
        ),
    ] = None,
    nproc: Annotated[
        int, typer.Option(min=1, help="Ranks to start on this machine, one a device.", rich_help_panel="Ranks")
    ] = 1,
    max_restarts: Annotated[
        int,
        typer.Option(
            min=0, help="With --nproc: how often to start all ranks again after one failed.", rich_help_panel="Ranks"
        ),
    ] = 0,
    allow_change: Annotated[
        bool,
        typer.Option(
            "--allow-change",
            help="Resume although a changed setting reorders the samples: some are repeated, others skipped.",
        ),
    ] = False,
) -> None:
    """Train a model. Resumes from the run directory's latest checkpoint; SIGTERM and Ctrl-C save one first.

    Every field of the configuration is in docs/reference/configuration.md; mt config schema prints them all, and mt
    config show what a run would use.

    Examples:
      mt train --data shakespeare.txt
      mt train run.toml --set train.steps=1000 --set optim.lr=1e-3
      mt train run.toml --nproc 2
      mt train --preset gpt2-124m --set 'data.paths=["corpus_text_document"]'
      mt train run/config.toml
    """
    from mt_core.distributed.environment import adopt_slurm, get_rank_info, refuse_nproc
    from mt_core.errors import MtError

    adopt_slurm()
    info = get_rank_info()
    refuse_nproc(nproc, info)
    if max_restarts and nproc == 1:
        raise MtError("--max-restarts", "given without --nproc", "torchrun has one of its own")
    if data is not None:
        files = [_prepare(data, files or [], overrides or [], preset, launched=info.launched), *(files or [])]
    if nproc > 1:
        raise typer.Exit(_launch(files or [], overrides or [], preset, nproc, max_restarts, allow_change))
    work = partial(_train, files or [], overrides or [], preset, allow_change)
    if info.launched:
        from mt_core.distributed.rank_process import end_with

        end_with(work, info)
    raise typer.Exit(work())


def _prepare(data: Path, files: list[Path], overrides: list[str], preset: str | None, *, launched: bool) -> Path:
    """The configuration of a run from a text; ranks of torchrun or srun would each prepare it."""
    from mt_cli.train.from_text import OPTION, TextRun, prepare_text_run, tell_decision
    from mt_core.errors import MtError

    if launched:
        raise MtError(OPTION, "given to a rank", "start once without a launcher, or with --nproc; then RUN/config.toml")
    return prepare_text_run(TextRun(data, files, overrides, preset), tell_decision)


def _train(files: list[Path], overrides: list[str], preset: str | None, allow_change: bool) -> int:
    from mt_cli.run_config import load_run_config
    from mt_cli.train.report import describe_run
    from mt_core.distributed.environment import get_rank_info

    info = get_rank_info()
    config = load_run_config(files, overrides, preset, announce=not info.launched)
    if info.rank == 0:  # before torch is imported, which takes seconds
        print(f"mt: {describe_run(config)}", file=sys.stderr, flush=True)
    from mt_cli.train.compose import run

    return run(config, allow_change=allow_change)


def _launch(
    files: list[Path], overrides: list[str], preset: str | None, nproc: int, max_restarts: int, allow_change: bool
) -> int:
    """Check the configuration once, without torch, then let the ranks load it again."""
    from mt_cli.run_config import load_run_config
    from mt_cli.train.run_lock import claim_run_directory
    from mt_core.distributed.launcher import launch
    from mt_core.distributed.topology import resolve_dims

    checked = load_run_config(files, overrides, preset, rules=False, announce=True)
    data = resolve_dims(checked.parallel, nproc).data
    config = load_run_config(files, [*overrides, f"parallel.data={data}"], preset)  # the batch must fit so many
    options = [part for text in overrides for part in ("--set", text)] + (["--preset", preset] if preset else [])
    options += ["--allow-change"] if allow_change else []
    arguments = ["-m", "mt_cli", "train", *map(str, files), *options]
    run_dir = Path(config.runtime.run_dir)
    if nproc > (cores := os.cpu_count() or nproc) and config.runtime.device != "cuda":
        allowed = f"on a CPU start at most {cores}, else each waits for the others"
        print(f"mt: --nproc: {nproc} ranks on {cores} cores; {allowed}", file=sys.stderr, flush=True)
    with claim_run_directory(run_dir):
        return launch(arguments, nproc, run_dir=run_dir, max_restarts=max_restarts)
