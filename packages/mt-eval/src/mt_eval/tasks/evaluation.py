"""What every task's command does around the task: open the checkpoint, choose sizes, run the model, report."""

import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from mt_core.contracts import ModelConfig
from mt_core.distributed.process_group import pick_device
from mt_core.errors import MtError
from mt_eval.encoding import TextEncoder
from mt_eval.load import Checkpoint, load_model, load_tokenizer
from mt_eval.options import ModelOptions, TaskOptions, TokenizerOptions
from mt_eval.report import Report, Sample, Value, check_output, publish
from mt_eval.tasks.scoring import TokenizedText, check_stride, make_windows, sum_losses
from mt_models.models.gpt import GPT

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens in a batch if no --batch-size is given: with 50k token ids their fp32 logits take 0.4 and 3.2 GB."""
LONGEST_WINDOW = 1024
"""Longest window of a perplexity if no --seq-length is given: that of the published models."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A task about to run on a checkpoint. The model is loaded last, when the rest is known to be right."""

    name: str
    task: TaskOptions
    model: ModelOptions
    checkpoint: Checkpoint
    encoder: TextEncoder
    started: float

    @classmethod
    def start(cls, name: str, task: TaskOptions, *, model: ModelOptions, tokenizer: TokenizerOptions) -> Self:
        """Open the checkpoint and its tokenizer."""
        started = time.monotonic()
        check_output(task.output)
        checkpoint = Checkpoint.open(task.load_dir, model.loader, model.loader_options)
        encoder = TextEncoder.create(load_tokenizer(checkpoint, tokenizer.config()), bos=task.bos)
        return cls(name, task, model, checkpoint, encoder, started)

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.checkpoint.loader.config()

    def load_model(self) -> GPT:
        """The model, ready to run."""
        return load_model(self.checkpoint, device=self.model.device, dtype=self.model.dtype)

    def seq_length(self, longest: int | None = None) -> tuple[int, str]:
        """Tokens in an input, and where that comes from.

        It is what `choose_seq_length` says, no more than `longest` unless more is asked for.
        """
        return choose_seq_length(self.checkpoint, self.task.seq_length, (longest, "longest input of the task"))

    def batch_size(self, model: GPT, length: int) -> int:
        """Inputs in a batch: what was asked for, or what fits a budget of tokens."""
        return self.task.batch_size or max(1, BATCH_TOKENS[next(model.parameters()).device.type] // length)

    def score(self, text: TokenizedText, stride: int | None) -> tuple[list[float], dict[str, Value]]:
        """Sum of losses of each document of a text, over windows, and the settings that it was computed with."""
        seq_length, source = self.seq_length(LONGEST_WINDOW)
        stride = stride or seq_length
        check_stride(stride, seq_length)
        model = self.load_model()
        batch_size = self.batch_size(model, seq_length)
        total = len(text.tokens)
        count = sum(1 for _ in make_windows(total, seq_length, stride))
        print(f"{self.name}: {total:,} tokens in {count:,} windows of {seq_length:,} ({source})", file=sys.stderr)
        losses = sum_losses(model, text, seq_length=seq_length, stride=stride, batch_size=batch_size)
        lengths = {"seq_length": seq_length, "seq_length_from": source}
        return losses, lengths | {"overlapping_eval": stride, "batch_size": batch_size}

    def finish(
        self,
        metrics: Mapping[str, float],
        *,
        counts: Mapping[str, int],
        settings: Mapping[str, Value],
        samples: Iterable[Sample],
    ) -> None:
        """Print and save what came out, of all samples and of each."""
        how = {
            "device": pick_device(self.model.device, where="--device").type,
            "dtype": self.model.dtype,
            "tokenizer": type(self.encoder.tokenizer).__name__,
            "before_each_text": self.encoder.describe_prefix(),
        }
        seconds = time.monotonic() - self.started
        report = Report(
            task=self.name,
            model=str(self.task.load_dir),
            data=str(self.task.data),
            metrics=metrics,
            counts=counts,
            settings={**settings, **how},
            seconds=seconds,
        )
        publish(report, self.task.output, samples)


def choose_seq_length(
    checkpoint: Checkpoint, asked: int | None, longest: tuple[int | None, str] = (None, "")
) -> tuple[int, str]:
    """Tokens in an input, and where that comes from.

    It is what was asked for, else what the run trained at, else all positions of the model; of these two no more than
    the first of `longest`, whose second says what that is.
    """
    positions = checkpoint.loader.config().max_seq_len
    if asked is not None:
        if asked > positions:
            raise MtError("--seq-length", f"{asked} tokens", f"1 to {positions}, the model's positions")
        return asked, "--seq-length"
    trained = checkpoint.trained_seq_length
    known = (min(trained, positions), "samples in training") if trained else (positions, "model's positions")
    return min(known, (longest[0] or positions, longest[1]), key=lambda pair: pair[0])
