"""`mt config`: look at a run's configuration without running it."""

import json
import math
import sys
from pathlib import Path

import typer

from mt_cli.options import Files, Overrides, Preset
from mt_core.cli.help import HelpfulCommand

app = typer.Typer(
    help="Show, check and compare configurations.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command(cls=HelpfulCommand)
def show(files: Files = None, overrides: Overrides = None, preset: Preset = None) -> None:
    """Print the resolved configuration as TOML: defaults, preset, files and overrides together.

    Example:
      mt config show run.toml --set optim.lr=1e-3
    """
    from mt_cli.run_config import resolve_values, to_toml

    print(to_toml(resolve_values(files or [], overrides or [], preset)), end="")


@app.command(cls=HelpfulCommand)
def check(files: Files = None, overrides: Overrides = None, preset: Preset = None) -> None:
    """Check a configuration and say what it would train; every problem is listed at once.

    Example:
      mt config check run.toml
    """
    from mt_cli.run_config import load_run_config
    from mt_cli.vocabulary import find_spare_rows
    from mt_core.config.run_config import sequence_lengths
    from mt_data.batching.batch_sizes import count_samples, make_batch_sizes

    config = load_run_config(files or [], overrides or [], preset)
    shapes = config.model.canonical_shapes().values()
    parameters = sum(math.prod(shape) for shape in shapes)
    tokens = count_samples(make_batch_sizes(config.batch), config.train.steps) * config.data.seq_length
    flops = tokens * config.model.flops_per_token(*sequence_lengths(config.data))
    for warning in find_spare_rows(config):
        print(f"mt: warning: {warning}", file=sys.stderr)
    print(f"ok: {parameters:,} parameters, {tokens:,} tokens, {flops:.3g} FLOP")


@app.command()
def diff(first: Path, second: Path) -> None:
    """Print every value that differs between two configurations, defaults and presets included.

    Example:
      mt config diff run.toml run/config.toml
    """
    from mt_cli.run_config import differences, resolve_values

    old, new = (resolve_values([path]) for path in (first, second))
    for key, was, now in differences(old, new):
        print(f"{key}: {json.dumps(was)} -> {json.dumps(now)}")


@app.command()
def schema() -> None:
    """Print the JSON schema of a run's configuration, with every field's documentation.

    Example:
      mt config schema > run.schema.json
    """
    from mt_cli.run_config import run_config_type
    from mt_core.config.loading import schema as json_schema

    print(json.dumps(json_schema(run_config_type()), indent=2))
