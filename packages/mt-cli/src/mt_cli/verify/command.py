"""`mt verify RUN.toml`: does my run compute the same under a layout as on one rank?"""

import json
import time
from typing import Annotated, Literal

import typer

from mt_cli.options import Files, Overrides, Preset

EXIT_DISAGREE = 1


def verify(
    files: Files = None,
    overrides: Overrides = None,
    preset: Preset = None,
    layouts: Annotated[
        list[str] | None,
        typer.Option(
            "--layout",
            help="Fields of the section parallel, as tensor=2,sequence=true; may be repeated. Else the run's own.",
        ),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks of each layout; those the other axes leave are data ranks.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps to compare.")] = 3,
    dtype: Annotated[
        Literal["fp64", "fp32", "bf16"], typer.Option(help="In fp64 differences up to 1e-12 agree; see the docs.")
    ] = "fp64",
    documents: Annotated[bool, typer.Option("--documents", help="Cut sequences into documents.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="A row for every parameter.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Run a configuration, shrunk, on CPU ranks and compare it with one rank. Exit code 1: they disagree.

    Example:
      mt verify run.toml --layout tensor=2,sequence=true --steps 1
    """
    from mt_cli.run_config import load_without_tokenizer
    from mt_cli.verify.layouts import cases, with_parallel
    from mt_cli.verify.shrink import VOCABULARY, shrink
    from mt_core.config.run_config import has_attention
    from mt_core.errors import MtError
    from mt_core.parallel.layout import build_layout

    began = time.monotonic()
    config, _ = load_without_tokenizer(files or [], overrides or [], preset, vocab_size=VOCABULARY)
    if documents and config.model.kind != "gpt":
        actual = f"sequences of a model of kind {config.model.kind!r} are not cut into documents"
        raise MtError("--documents", actual, "leave it out")
    if not has_attention(config):
        raise MtError("model.kind", f"{config.model.kind!r} has no attention", "mt verify takes models with attention")
    chosen = cases(config, layouts or [], ranks)
    small = shrink(config, [build_layout(with_parallel(config, case.parallel)) for case in chosen])
    precision = small.precision.model_copy(update={"dtype": dtype, "gradients": "auto"})
    small = small.model_copy(update={"precision": precision})
    from mt_cli.verify.check import check
    from mt_cli.verify.report import as_values, head, last_line, lines

    if not as_json:
        print("\n".join(head(config, small)), flush=True)
    outcomes = []
    for outcome in check(small, chosen, steps=steps, documents=documents):
        outcomes.append(outcome)
        if not as_json:
            print("\n".join(lines(outcome, everything=everything)), flush=True)
    seconds = time.monotonic() - began
    print(json.dumps(as_values(small, outcomes, seconds), indent=2) if as_json else last_line(outcomes, seconds))
    if not all(outcome.agrees for outcome in outcomes):
        raise typer.Exit(EXIT_DISAGREE)
