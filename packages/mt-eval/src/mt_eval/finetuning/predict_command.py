"""`mt task predict` and `mt task ensemble`: what tuned models say, alone and together; only `mt` imports it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from typer import Argument, Option

from mt_core.cli.options import expand_options
from mt_eval.finetuning.command import TaskCommand
from mt_eval.options import LoadDir, ModelOptions, TokenizerOptions

if TYPE_CHECKING:
    from mt_eval.finetuning.tuned import TunedTask


@expand_options
def predict(
    load_dir: LoadDir,
    data: Annotated[
        list[Path], Option(help="Files to predict, or folders of RACE; labels are compared if there are some.")
    ],
    save_dir: Annotated[Path, Option(help="New directory for a file of predictions of each set.")],
    model: ModelOptions,
    tokenizer: TokenizerOptions,
    task_name: Annotated[
        str | None, Option(help="race, or a task of GLUE; that of the run if the checkpoint is one of mt task.")
    ] = None,
    classes: Annotated[
        list[str] | None,
        Option(help="Classes in the order of the head's logits, of a checkpoint that is no run of mt task."),
    ] = None,
    seq_length: Annotated[
        int | None, Option(min=1, help="Tokens of a sample; the run's, or the positions if there is none.")
    ] = None,
    max_qa_length: Annotated[
        int | None, Option(min=1, help="Most tokens of RACE's question and option; the run's.")
    ] = None,
    batch_size: Annotated[int, Option(min=1, help="Samples in a batch; changes the speed only.")] = 32,
) -> None:
    """Predict files with a tuned checkpoint, without training.

    Examples:
      mt task predict --load-dir mnli --data test.tsv --save-dir predictions
      mt task predict --load-dir hf --task-name rte --classes not_entailment entailment --data dev.tsv --save-dir rte
    """
    from mt_core.files import atomic_directory
    from mt_eval.finetuning import tuned
    from mt_eval.finetuning.predictions import print_qualities, write_predictions, write_summary
    from mt_eval.load import Checkpoint

    tuned.check_new(save_dir)
    checkpoint = Checkpoint.open(load_dir, model.loader, model.loader_options)
    given: TunedTask = tuned.find_task(
        checkpoint, task_name, classes, seq_length=seq_length, max_qa_length=max_qa_length
    )
    sets = tuned.predict_files(
        checkpoint, given, data, model=model, tokenizer=tokenizer.config(), batch_size=batch_size
    )
    with atomic_directory(save_dir) as temporary:
        for name, predictions in sets.items():
            write_predictions(temporary / f"{name}.jsonl", predictions)
        write_summary(temporary, sets)
    print_qualities(sets)


cast(Any, predict).command_class = TaskCommand


def ensemble(
    runs: Annotated[list[Path], Argument(help="Runs of mt task, folders or files of predictions of one set.")],
    save_dir: Annotated[Path, Option(help="New directory for a file of predictions of each set.")],
    threshold: Annotated[
        float | None,
        Option(
            min=0, max=1, help="Of two classes: predict the second if its probability is above this, else the first."
        ),
    ] = None,
    tune_threshold: Annotated[
        list[str] | None,
        Option(
            help="Choose the threshold, 0.00 to 0.99, that is right most often on this set; may be given several times."
        ),
    ] = None,
) -> None:
    """Ensemble: the mean of several runs' probabilities, or numbers, for every set that they predicted.

    Examples:
      mt task ensemble run-1 run-2 run-3 --save-dir ensemble
      mt task ensemble run-1 run-2 --tune-threshold dev --save-dir ensemble
    """
    from mt_eval.finetuning.ensemble import apply_threshold, average, choose_threshold, find_files, write_ensemble
    from mt_eval.finetuning.predictions import print_qualities
    from mt_eval.finetuning.tuned import check_new

    check_new(save_dir)
    sets = {name: average(files) for name, files in find_files(runs).items()}
    if tune_threshold:
        threshold = choose_threshold(sets, tune_threshold, threshold)
    if threshold is not None:
        sets = apply_threshold(sets, threshold)
        print(f"threshold  {threshold:.2f}" + (f", chosen on {', '.join(tune_threshold)}" if tune_threshold else ""))
    write_ensemble(sets, save_dir)
    print_qualities(sets)
