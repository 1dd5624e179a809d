"""`mt ckpt inspect`, `diff`, `verify`, `average`, `upcycle` and `prune`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from mt_core.cli.completion import complete_names
from mt_core.cli.options import CheckpointCommand, split_suffix
from mt_core.errors import MtError
from mt_core.plugins import Kind

Checkpoint = Annotated[Path, typer.Argument(help="A run, a step, or a directory in another format.")]
Format = Annotated[
    str | None,
    typer.Option(
        help="Format to read; found from the files if not given.", autocompletion=complete_names("ckpt-loader")
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DIFFERENT = 1
"""Exit code of a comparison that found a difference."""


class LoadSaveCommand(CheckpointCommand):
    """A command that takes the options of loaders and a saver."""

    kinds: ClassVar[Mapping[str, Kind]] = {"loader": "ckpt-loader", "saver": "ckpt-saver"}
    checkpoints: ClassVar[Mapping[str, Sequence[str]]] = {"loader": ("load_dir", "path", "paths")}


class CompareCommand(CheckpointCommand):
    """A command that takes the options of two loaders, B's with `-b` at the end of their names."""

    kinds: ClassVar[Mapping[str, Kind]] = {"loader": "ckpt-loader", "loader_b": "ckpt-loader"}
    checkpoints: ClassVar[Mapping[str, Sequence[str]]] = {"loader": ("a",), "loader_b": ("b",)}


def register(app: typer.Typer) -> None:
    """Add these commands to `mt ckpt`."""
    commands = {
        inspect: CheckpointCommand,
        diff: CompareCommand,
        verify: CompareCommand,
        average: LoadSaveCommand,
        upcycle: LoadSaveCommand,
    }
    for command, cls in commands.items():
        app.command(cls=cls, context_settings=cls.settings)(command)
    app.command()(prune)


def inspect(
    ctx: typer.Context,
    path: Checkpoint,
    loader: Format = None,
    hashes: Annotated[bool, typer.Option("--hash", help="SHA-256 of every tensor's bytes; reads all of them.")] = False,
    json: Json = False,
) -> None:
    """Show a checkpoint's tensors, totals, configuration, layout and files.

    Example:
      mt ckpt inspect run
    """
    from mt_ckpt.tools.inspect import format_report, inspect_checkpoint, tensor_rows, to_json
    from mt_core.checkpoint.detection import detect_loader

    options = ctx.obj or {}
    if json:
        return _print_json(to_json(path, loader or detect_loader(path), hashed=hashes, options=options))
    for line in format_report(inspect_checkpoint(path, loader, options)):
        print(line)
    for row in tensor_rows(path, loader, hashed=True, options=options) if hashes else ():
        print(f"{row['sha256']}  {row['name']}")


def diff(
    ctx: typer.Context,
    a: Checkpoint,
    b: Checkpoint,
    rtol: Annotated[float, typer.Option(min=0, help="Allowed difference as a part of A's number.")] = 0.0,
    atol: Annotated[float, typer.Option(min=0, help="Allowed absolute difference.")] = 0.0,
    loader: Format = None,
    loader_b: Format = None,
    json: Json = False,
) -> None:
    """Compare two checkpoints tensor by tensor; exits with 0 if they are the same, with 1 if not.

    A number may be off by --atol plus --rtol times A's. Dtypes may differ if either is given. B's loader takes its
    options with -b at the end of their names.

    Example:
      mt ckpt diff run hf
    """
    from mt_ckpt.tools.differences import Tolerance, differences, format_lines, to_json

    options = split_suffix(ctx.obj or {})
    result = differences(a, b, loaders=(loader, loader_b), options=options, tolerance=Tolerance(rtol, atol))
    if json:
        _print_json(to_json(result))
    else:
        print("\n".join(format_lines(result)))
    raise typer.Exit(0 if result.same else DIFFERENT)


def verify(ctx: typer.Context, a: Checkpoint, b: Checkpoint, loader: Format = None, loader_b: Format = None) -> None:
    """Compare two checkpoints' logits on fixed tokens, in fp32; exits with 0 if they are equal, with 1 if not.

    Example:
      mt ckpt verify run hf
    """
    from mt_ckpt.conversion.verify import compare_logits

    equal = True
    for comparison in compare_logits(a, b, loaders=(loader, loader_b), options=split_suffix(ctx.obj or {})):
        print(f"{'equal' if comparison.equal else 'different'}: {comparison}")
        equal = equal and comparison.equal
    raise typer.Exit(0 if equal else DIFFERENT)


def average(
    ctx: typer.Context,
    paths: Annotated[list[Path], typer.Argument(help="Checkpoints of one model.")],
    save_dir: Annotated[Path, typer.Option(help="Directory to write; must not exist.")],
    weights: Annotated[
        str | None, typer.Option(help="One number a checkpoint, such as 0.7,0.3; divided by their sum.")
    ] = None,
    loader: Format = None,
    saver: Annotated[
        str, typer.Option(help="Format to write.", autocompletion=complete_names("ckpt-saver"))
    ] = "native",
) -> None:
    """Write the mean of several checkpoints of one model, computed in fp32.

    Example:
      mt ckpt average run/step-00000020 run/step-00000040 --save-dir mean
    """
    from mt_ckpt.tools import average as tool

    parsed = tool.parse_weights(weights) if weights else None
    count = tool.average(paths, save_dir, weights=parsed, loader=loader, saver=saver, options=ctx.obj or {})
    print(f"wrote {save_dir}: {count} tensors, the mean of {len(paths)} checkpoints")


def upcycle(
    ctx: typer.Context,
    path: Checkpoint,
    save_dir: Annotated[Path, typer.Option(help="Directory to write; must not exist.")],
    experts: Annotated[int, typer.Option(min=2, help="How often each feed-forward layer is copied.")],
    top_k: Annotated[int, typer.Option(min=2, help="Experts of a token.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the routers, which are drawn as at a training's start.")] = 0,
    loader: Format = None,
    saver: Annotated[
        str, typer.Option(help="Format to write.", autocompletion=complete_names("ckpt-saver"))
    ] = "native",
) -> None:
    """Turn a dense model into a mixture of experts with the same logits: experts are copies, their weights sum to 1.

    Example:
      mt ckpt upcycle run --experts 4 --save-dir mixture
    """
    from mt_ckpt.tools import upcycle as tool

    formats = tool.Formats(loader, saver, ctx.obj or {})
    made = tool.upcycle(path, save_dir, experts=experts, top_k=top_k, seed=seed, formats=formats)
    print(f"wrote {save_dir}: {made.layers} layers of {experts} experts, {made.parameter_count:,} parameters")


def prune(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    keep: Annotated[int, typer.Option(min=1, help="How many of the newest steps stay.")],
) -> None:
    """Delete all but the newest steps of a run; those that another process reads stay too.

    Example:
      mt ckpt prune run --keep 2
    """
    from mt_core.checkpoint import native

    before = [step.name for step in native.steps(run)]
    if not before:
        raise MtError(str(run), "holds no committed steps", "give a run directory")
    native.prune(run, keep)
    kept = [step.name for step in native.steps(run)]
    print(f"removed: {', '.join(name for name in before if name not in kept) or 'none'}")
    print(f"kept: {', '.join(kept)}")


def _print_json(values: dict[str, Any]) -> None:
    import json

    print(json.dumps(values, indent=2))
