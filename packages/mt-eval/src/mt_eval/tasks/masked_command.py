"""`mt eval masked-lm` and `mt eval span`; only `mt` imports this module. Heavy imports wait until a task runs."""

import time
from dataclasses import dataclass
from typing import Annotated

from typer import Option

from mt_core.cli.options import expand_options
from mt_eval.options import BatchSize, LoadDir, ModelOptions, Output, TokenizerOptions


@dataclass(frozen=True, slots=True)
class MaskedOptions:
    """What the tasks of hidden words take."""

    load_dir: LoadDir
    data: Annotated[str, "Prefix of a .bin/.idx pair of sentences; mt data preprocess --split-sentences writes one."]
    split: Annotated[
        str | None,
        Option(help='Shares as "90,10,0", the second of which is used; all data if not given.', show_default=False),
    ] = None
    samples: Annotated[
        int | None, Option(min=1, help="Samples to evaluate; one pass over the data if not given.", show_default=False)
    ] = None
    seed: Annotated[
        int | None,
        Option(min=0, help="Seed of samples and masks; the run's, or 1234, if not given.", show_default=False),
    ] = None
    seq_length: Annotated[
        int | None,
        Option(
            min=1, help="Tokens in a sample; the run's, or the model's positions, if not given.", show_default=False
        ),
    ] = None
    batch_size: BatchSize = None
    output: Output = None


@expand_options
def masked_lm(task: MaskedOptions, model: ModelOptions, tokenizer: TokenizerOptions) -> None:
    """Masked words: loss of a BERT's hidden words, and of the order of two parts, on held-out sentences.

    Words are hidden as the run hid them. With its corpus, data.split, seed, and eval_batches × global_batch samples,
    the numbers are those that the run logged as valid_….

    Example:
      mt eval masked-lm --load-dir run --data bert_text_sentence --split 90,10,0
    """
    _evaluate("masked-lm", "bert", task, model, tokenizer)


@expand_options
def span(task: MaskedOptions, model: ModelOptions, tokenizer: TokenizerOptions) -> None:
    """Masked spans: loss of the words that a T5's decoder writes for hidden spans, on held-out sentences.

    Spans are hidden as the run hid them. With its corpus, data.split, seed, and eval_batches × global_batch samples,
    the numbers are those that the run logged as valid_….

    Example:
      mt eval span --load-dir run --data t5_text_sentence --split 90,10,0
    """
    _evaluate("span", "t5", task, model, tokenizer)


def _evaluate(name: str, kind: str, task: MaskedOptions, model: ModelOptions, tokenizer: TokenizerOptions) -> None:
    from mt_core.distributed.process_group import pick_device
    from mt_eval.load import Checkpoint
    from mt_eval.report import Report, check_output, publish
    from mt_eval.tasks import masked

    started = time.monotonic()
    check_output(task.output)
    checkpoint = Checkpoint.open(task.load_dir, model.loader)
    config, run = masked.check_model(checkpoint, kind), masked.read_run(task.load_dir)
    held_out = masked.HeldOut(task.data, task.split, task.samples, task.seed, task.seq_length)
    chosen = masked.make_tokenizer_config(checkpoint, tokenizer)
    data = masked.make_data_section(config, run, held_out, chosen)
    with masked.open_samples(data, held_out, run) as (samples, seed):
        losses, batch_size = masked.compute_losses(
            checkpoint,
            samples,
            length=data.seq_length,
            batch_size=task.batch_size,
            device=model.device,
            dtype=model.dtype,
        )
        counts = {"samples": len(samples)}
    settings = {
        "split": data.split,
        "seed": seed,
        "seq_length": data.seq_length,
        "mask_prob": data.mask_prob,
        "batch_size": batch_size,
        "device": pick_device(model.device, where="--device").type,
        "dtype": model.dtype,
        "tokenizer": chosen.type,
    }
    seconds = time.monotonic() - started
    report = Report(name, str(task.load_dir), task.data, losses.compute_metrics(), counts, settings, seconds)
    publish(report, task.output, losses.list_samples())
