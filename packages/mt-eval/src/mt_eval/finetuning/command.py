"""`mt task`, a group of the installed tasks, and the fine-tuning tasks of mt-eval; only `mt` imports this module.

Heavy imports wait until a task runs, so --help is instant.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from typer import Exit, Option

from mt_core.cli.completion import complete_names
from mt_core.cli.options import CheckpointCommand, MultiValueCommand, PluginValues, expand_options
from mt_core.cli.plugin_group import plugin_group
from mt_eval.options import TokenizerOptions

if TYPE_CHECKING:
    from mt_eval.finetuning.recipe import Recipe

app = plugin_group("task", "Fine-tune a model for a task, and use what comes out.")
"""`mt task`: each task is imported when it is run."""


class TaskCommand(MultiValueCommand, CheckpointCommand):
    """A command whose list options take several values at once, and that takes its checkpoint's loader's options."""


def _default(text: str) -> Any:
    return Option(help=f"{text}; the task's own if not given.", show_default=False, min=1)


@dataclass(frozen=True, slots=True)
class FineTuning:
    """What every fine-tuning task takes."""

    load_dir: Annotated[Path, "Pretrained BERT: a run, a step, a Megatron or a Hugging Face directory."]
    train_data: Annotated[list[Path], "Training files; of RACE, folders of .txt files."]
    save_dir: Annotated[Path, "Run directory: checkpoints, metrics and predictions. A run in it goes on."]
    valid_data: Annotated[list[Path] | None, "Files evaluated after each epoch, apart and together."] = None
    test_data: Annotated[list[Path] | None, "Files to predict at the end; they need no labels."] = None
    loader: Annotated[
        str | None,
        Option(
            help="Checkpoint format; found from the directory if not given.",
            autocompletion=complete_names("ckpt-loader"),
        ),
    ] = None
    loader_options: PluginValues = field(default_factory=dict)
    epochs: Annotated[int | None, _default("Passes over the training files")] = None
    micro_batch_size: Annotated[int | None, _default("Samples in a forward pass of one rank")] = None
    global_batch_size: Annotated[int | None, _default("Samples in an optimizer step, over all ranks")] = None
    lr: Annotated[float | None, Option(help="Highest learning rate; the task's own if not given.")] = None
    lr_warmup_fraction: Annotated[
        float | None, Option(help="Share of the steps that warm up; the task's own if not given.")
    ] = None
    weight_decay: Annotated[float | None, Option(help="Decay of matrices; 0.1 if not given.")] = None
    seq_length: Annotated[int | None, _default("Tokens of a sample, at most the model's positions")] = None
    seed: Annotated[int, Option(min=0, help="Seed of the head and of the order of samples.")] = 1234
    skip_bad_rows: Annotated[
        bool, Option("--skip-bad-rows", help="Leave out examples that cannot be read, and say how many.")
    ] = False
    nproc: Annotated[int, Option(min=1, help="Ranks to start on this machine, one a device.")] = 1
    overrides: Annotated[
        list[str] | None, Option("--set", help="Any other setting of mt train: section.field=value.")
    ] = None


@expand_options
def race(
    task: FineTuning,
    tokenizer: TokenizerOptions,
    max_qa_length: Annotated[int | None, Option(min=1, help="Most tokens of question and option; 128.")] = None,
) -> None:
    """RACE: which of four options answers a question on a passage.

    Example:
      mt task race --load-dir bert --train-data RACE/train/middle --valid-data RACE/dev/middle --save-dir run
    """
    _fine_tune("race", task, tokenizer, max_qa_length)


@expand_options
def mnli(task: FineTuning, tokenizer: TokenizerOptions) -> None:
    """MNLI: whether a sentence follows from another, contradicts it, or neither.

    Example:
      mt task mnli --load-dir bert --train-data MNLI/train.tsv --valid-data MNLI/dev_matched.tsv --save-dir run
    """
    _fine_tune("mnli", task, tokenizer)


@expand_options
def qqp(task: FineTuning, tokenizer: TokenizerOptions) -> None:
    """QQP: whether two questions ask the same.

    Example:
      mt task qqp --load-dir bert --train-data QQP/train.tsv --valid-data QQP/dev.tsv --save-dir run
    """
    _fine_tune("qqp", task, tokenizer)


@expand_options
def run_glue(
    task: FineTuning,
    tokenizer: TokenizerOptions,
    name: Annotated[str, Option("--task-name", help="cola, mnli, mrpc, qnli, qqp, rte, sst-2, sts-b or wnli.")],
) -> None:
    """GLUE: the class of a sentence or of a pair, or how alike a pair is, in the layout of any of its tasks.

    Example:
      mt task glue --task-name rte --load-dir bert --train-data RTE/train.tsv --valid-data RTE/dev.tsv --save-dir run
    """
    from mt_core.errors import MtError
    from mt_core.plugins import did_you_mean
    from mt_eval.finetuning.glue import LAYOUTS

    if name.lower() not in LAYOUTS:
        raise MtError("--task-name", f"unknown task {name!r}", did_you_mean(name, list(LAYOUTS)))
    _fine_tune(name.lower(), task, tokenizer)


for _command in (race, mnli, qqp, run_glue):
    cast(Any, _command).command_class = TaskCommand


def _fine_tune(name: str, task: FineTuning, tokenizer: TokenizerOptions, max_qa_length: int | None = None) -> None:
    """Write the run's configuration, have mt train run it, and predict."""
    from mt_core.checkpoint.detection import detect_loader, open_checkpoint
    from mt_core.distributed.environment import get_rank_info
    from mt_core.errors import MtError
    from mt_core.plugins import component
    from mt_eval.finetuning import recipe, sections

    if get_rank_info().launched:
        allowed = f"start once, with --nproc; or mt train {task.save_dir / recipe.RUN_FILE} once it is written"
        raise MtError(f"mt task {name}", "is started as a rank", allowed)
    loader = task.loader or detect_loader(task.load_dir)
    model = recipe.check_model(open_checkpoint(task.load_dir, loader, task.loader_options).config(), task.load_dir)
    source = recipe.Source(loader, task.load_dir, task.loader_options, model, tokenizer.config())
    chosen = _choose(recipe.RECIPES.get(name, recipe.SMALL), task, model.max_seq_len)
    files = recipe.Files(task.train_data, task.valid_data or (), task.skip_bad_rows)
    data = recipe.make_data(name, files, chosen, max_qa_length)
    sets = sections.load_sets(data)
    if sets.skipped:
        print(f"mt: left out {len(sets.skipped)} examples, the first of them: {sets.skipped[0]}", file=sys.stderr)
    tests = sections.read_tests(data, [str(path) for path in task.test_data or ()])
    values = recipe.make_run(source, data, sets, chosen, run_dir=task.save_dir, seed=task.seed)
    path = recipe.write_run(task.save_dir, values)
    train = cast(Callable[..., None], component("command", "train"))
    try:
        train([path], task.overrides or [], None, nproc=task.nproc)
    except Exit as ended:
        if ended.exit_code:
            raise
    from mt_eval.finetuning.predictions import predict_run, print_qualities

    print_qualities(predict_run(task.save_dir, data, tests))


def _choose(defaults: "Recipe", task: FineTuning, positions: int) -> "Recipe":
    """The task's settings, with those that the user gives."""
    given = {
        "epochs": task.epochs,
        "micro_batch": task.micro_batch_size,
        "global_batch": task.global_batch_size,
        "lr": task.lr,
        "warmup_fraction": task.lr_warmup_fraction,
        "weight_decay": task.weight_decay,
        "seq_length": task.seq_length or min(defaults.seq_length, positions),
    }
    return replace(defaults, **{name: value for name, value in given.items() if value is not None})
