"""What every task's command does around the task: open the checkpoint, choose sizes, run the model, report."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from mt_core.contracts import ModelConfig, Tokenizer
from mt_core.distributed.process_group import pick_device
from mt_core.errors import MtError
from mt_eval.load import Checkpoint, load_model, load_tokenizer
from mt_eval.options import ModelOptions, TaskOptions, TokenizerOptions
from mt_eval.report import Report, Value, check_output, publish
from mt_eval.tasks.scoring import check_stride, make_windows, sum_loss
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
    tokenizer: Tokenizer
    started: float

    @classmethod
    def start(cls, name: str, task: TaskOptions, *, model: ModelOptions, tokenizer: TokenizerOptions) -> Self:
        """Open the checkpoint and its tokenizer."""
        started = time.monotonic()
        check_output(task.output)
        checkpoint = Checkpoint.open(task.load_dir, model.loader)
        return cls(name, task, model, checkpoint, load_tokenizer(checkpoint, tokenizer.config()), started)

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.checkpoint.loader.config()

    def load_model(self) -> GPT:
        """The model, ready to run."""
        return load_model(self.checkpoint, device=self.model.device, dtype=self.model.dtype)

    def seq_length(self, longest: int | None = None) -> int:
        """Tokens in an input: what was asked for, or all positions of the model up to `longest`."""
        asked, positions = self.task.seq_length, self.config.max_seq_len
        if asked is not None and asked > positions:
            raise MtError("--seq-length", f"{asked} tokens", f"1 to {positions}, the model's positions")
        return asked or min(positions, longest or positions)

    def batch_size(self, model: GPT, length: int) -> int:
        """Inputs in a batch: what was asked for, or what fits a budget of tokens."""
        return self.task.batch_size or max(1, BATCH_TOKENS[next(model.parameters()).device.type] // length)

    def score(self, tokens: Sequence[int], stride: int | None) -> tuple[float, dict[str, Value]]:
        """Sum of losses over windows of `tokens`, and the settings that it was computed with."""
        seq_length = self.seq_length(LONGEST_WINDOW)
        stride = stride or seq_length
        check_stride(stride, seq_length)
        model = self.load_model()
        batch_size = self.batch_size(model, seq_length)
        count = sum(1 for _ in make_windows(len(tokens), seq_length, stride))
        print(f"{self.name}: {len(tokens):,} tokens in {count:,} windows of {seq_length:,}", file=sys.stderr)
        loss_sum = sum_loss(model, tokens, seq_length=seq_length, stride=stride, batch_size=batch_size)
        return loss_sum, {"seq_length": seq_length, "overlapping_eval": stride, "batch_size": batch_size}

    def finish(self, metrics: Mapping[str, float], *, counts: Mapping[str, int], settings: Mapping[str, Value]) -> None:
        """Print and save what came out."""
        how = {
            "device": pick_device(self.model.device, where="--device").type,
            "dtype": self.model.dtype,
            "tokenizer": type(self.tokenizer).__name__,
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
        publish(report, self.task.output)
