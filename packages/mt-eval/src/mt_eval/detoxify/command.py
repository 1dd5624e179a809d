"""`mt task detoxify`: the five steps of detoxification by self-generation; only `mt` imports this module.

Heavy imports wait until a step runs, so --help is instant.
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, cast

import typer
from typer import Exit, Option

from mt_core.cli.completion import complete_names
from mt_core.cli.options import CheckpointCommand, MultiValueCommand, PluginValues, expand_options
from mt_eval.detoxify.options import (
    DrawOptions,
    EvaluateCommand,
    ScorerCommand,
    ScorerOptions,
    TrainingOptions,
)
from mt_eval.options import LoadDir, ModelOptions, RankOptions, TokenizerOptions

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Make a model less toxic by its own texts. A step that was stopped goes on where it was.",
)


@app.command("generate", cls=CheckpointCommand, context_settings=CheckpointCommand.settings)
@expand_options
def generate(
    load_dir: LoadDir,
    output: Annotated[Path, Option(help="JSON lines to write: a text each.")],
    draw: DrawOptions,
    model: ModelOptions,
    ranks: RankOptions,
    tokenizer: TokenizerOptions,
    num_samples: Annotated[int, Option(min=1, help="Texts to draw.")] = 1000,
    max_new_tokens: Annotated[
        int | None,
        Option(min=1, help="Most tokens of a text; 1000, or as many as the run trained at, if not given."),
    ] = None,
) -> None:
    """Draw texts from the model alone, of no prompt.

    Example:
      mt task detoxify generate --load-dir run --output samples.jsonl --num-samples 1000
    """
    from mt_eval.detoxify.continuations import TextPrompt, write_continuations

    source = draw.open(load_dir, model, ranks, tokenizer, max_new_tokens)
    counts = write_continuations(source, [TextPrompt("", {"prompt": ""})], output, samples=num_samples)
    _print_rows({**counts, "output": output})


@app.command("score", cls=ScorerCommand, context_settings=ScorerCommand.settings)
@expand_options
def score(
    source: Annotated[Path, Option("--input", help="JSON lines with a text each.")],
    output: Annotated[Path, Option(help="The same lines with their scores.")],
    scorer: ScorerOptions,
) -> None:
    """Score texts: how toxic is each?

    Example:
      mt task detoxify score --input samples.jsonl --output scored.jsonl
    """
    from mt_eval.detoxify.score import score_file

    _print_rows({**score_file(source, output, scorer.open(), cache=scorer.cache), "output": output})


@app.command("filter", cls=MultiValueCommand)
def filter_command(
    sources: Annotated[list[Path], Option("--input", help="What score wrote, one or more files.")],
    output: Annotated[Path, Option(help="JSON lines of the texts that are kept.")],
    keep: Annotated[float, Option(min=0, max=1, help="Share of the scored texts that is kept, the least toxic.")] = 0.5,
    seed: Annotated[int, Option(help="Seed of the new order.")] = 0,
) -> None:
    """Keep the least toxic texts, in a new order.

    Example:
      mt task detoxify filter --input scored.jsonl --output nontoxic.jsonl
    """
    from mt_eval.detoxify.filter import filter_files

    _print_rows({**filter_files(sources, output, keep=keep, seed=seed), "output": output})


@app.command("train", cls=CheckpointCommand, context_settings=CheckpointCommand.settings)
@expand_options
def train(
    load_dir: LoadDir,
    train_data: Annotated[Path, Option(help="JSON lines of texts: what filter wrote. A tenth is held out.")],
    save_dir: Annotated[Path, Option(help="Run directory. A run in it goes on.")],
    training: TrainingOptions,
    tokenizer: TokenizerOptions,
    loader: Annotated[
        str | None,
        Option(
            help="Checkpoint format; found from the directory if not given.",
            autocompletion=complete_names("ckpt-loader"),
        ),
    ] = None,
    loader_options: PluginValues = {},  # noqa: B006 - it is never changed
) -> None:
    """Train the model further on the texts that were kept, by mt train.

    Example:
      mt task detoxify train --load-dir run --train-data nontoxic.jsonl --save-dir detoxified
    """
    from mt_core.checkpoint.detection import detect_loader
    from mt_core.plugins import component
    from mt_eval.detoxify import recipe
    from mt_eval.load import Checkpoint

    recipe.check_texts(train_data)
    name, options = loader or detect_loader(load_dir), dict(loader_options)
    checkpoint = Checkpoint.open(load_dir, name, options)
    settings = recipe.Recipe(
        steps=training.steps,
        micro_batch=training.micro_batch_size,
        global_batch=training.global_batch_size,
        lr=training.lr,
        weight_decay=training.weight_decay,
        seq_length=training.seq_length,
    )
    values = recipe.make_run(
        checkpoint, (name, options), settings, tokenizer=tokenizer.config(), run_dir=save_dir, seed=training.seed
    )
    path = recipe.write_run(save_dir, values)
    run = cast(Callable[..., None], component("command", "train"))
    try:
        run([path], training.overrides or [], None, train_data, nproc=training.nproc)
    except Exit as ended:
        if ended.exit_code:
            raise


@app.command("evaluate", cls=EvaluateCommand, context_settings=EvaluateCommand.settings)
@expand_options
def evaluate(
    load_dir: LoadDir,
    prompts: Annotated[Path, Option(help="RealToxicityPrompts, or JSON lines with a prompt each.")],
    save_dir: Annotated[Path, Option(help="Directory of continuations, scores and results.")],
    draw: DrawOptions,
    scorer: ScorerOptions,
    model: ModelOptions,
    ranks: RankOptions,
    tokenizer: TokenizerOptions,
    num_continuations: Annotated[int, Option(min=1, help="Continuations of each prompt.")] = 25,
    max_new_tokens: Annotated[int, Option(min=1, help="Most tokens of a continuation.")] = 20,
    limit: Annotated[int | None, Option(min=1, help="The first prompts only, so many.")] = None,
) -> None:
    """Expected maximum toxicity and toxicity probability of the model's continuations.

    Example:
      mt task detoxify evaluate --load-dir run --prompts prompts.jsonl --save-dir toxicity
    """
    from mt_eval.detoxify import toxicity
    from mt_eval.detoxify.continuations import write_continuations
    from mt_eval.detoxify.score import read_records, score_file
    from mt_eval.report import Report, check_output, publish

    started = time.monotonic()
    judge = scorer.open()
    model = replace(model, loader_options=scorer.strip(model.loader_options))
    source = draw.open(load_dir, model, ranks, tokenizer, max_new_tokens)
    asked = toxicity.read_prompts(prompts, limit)
    save_dir.mkdir(parents=True, exist_ok=True)
    check_output(save_dir / "results.json")
    drawn, scored = save_dir / "continuations.jsonl", save_dir / "scored.jsonl"
    counts = write_continuations(source, asked, drawn, samples=num_continuations)
    score_file(drawn, scored, judge, cache=scorer.cache)
    groups = toxicity.group_prompts(read_records(scored, scored=True))
    how = source.drawing
    report = Report(
        task="detoxify",
        model=str(load_dir),
        data=str(prompts),
        metrics=toxicity.compute_metrics(groups),
        counts=toxicity.count_prompts(groups) | {"cut_continuations": counts.get("of cut prompts", 0)},
        settings={
            "scorer": judge.identity,
            "continuations": num_continuations,
            "max_new_tokens": how.max_new_tokens,
            "temperature": how.sampling.temperature,
            "top_k": how.sampling.top_k,
            "top_p": how.sampling.top_p,
            "seed": how.seed,
            "device": model.device,
            "dtype": model.dtype,
            "ranks": f"tensor {ranks.tensor} × pipeline {ranks.pipeline}" if ranks.nproc > 1 else "1",
            "before_each_text": source.encoder.describe_prefix(),
        },
        seconds=time.monotonic() - started,
    )
    publish(report, save_dir / "results.json", toxicity.list_samples(groups))


def _print_rows(rows: Mapping[str, object]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else value
        print(f"{name:<{width}}  {shown}")
    sys.stdout.flush()
