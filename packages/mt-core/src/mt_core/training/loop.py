"""The training loop: steps, log lines, evaluations, checkpoints, and leaving in good order.

Between steps the ranks agree, in one small sum on the CPU, on the step's valid tokens and on whether one was asked to
stop; nothing else in a step waits for the GPU.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mt_core.checkpoint.native import prune, step_directory, write
from mt_core.parallel.axis import Axis
from mt_core.training.learning_rate import learning_rate
from mt_core.training.seeds import seed_step
from mt_core.training.state import TrainState
from mt_core.training.step import Batch, backward, evaluate, update, valid_tokens
from mt_core.training.stop import StopRequest
from mt_core.types import MetricSink

PEAK_FLOPS = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-80GB": 312e12}
"""Dense bf16 peaks by the vendor's datasheets, for the share of peak in metrics."""


@dataclass(frozen=True, slots=True)
class Run:
    """Everything the loop needs; `config` is the whole resolved tree."""

    config: Any
    state: TrainState
    axis: Axis
    device: torch.device
    train_batches: Iterator[Batch]
    valid_batches: Callable[[], Iterator[Batch]] | None
    sinks: Sequence[MetricSink]
    """Empty on every rank but the first."""
    tokenizer_files: Sequence[Path] = ()

    @property
    def micro_batches(self) -> int:
        """Micro-batches of this rank in one step."""
        return self.config.batch.global_batch // (self.config.batch.micro_batch * self.axis.size)


def train(run: Run, stop: StopRequest) -> bool:
    """Train to the last step; False if a stop was asked for first. Either way the state is saved at the end."""
    position, schedule = run.state.position, run.config.schedule
    run.state.model.train()
    clock = _Clock(run)
    saved = position.step
    stopped = False
    while position.step < schedule.steps:
        batches = list(islice(run.train_batches, run.micro_batches))
        assert len(batches) == run.micro_batches, "the dataset is sized for the whole run"
        agreed = run.axis.sum_(
            torch.tensor([valid_tokens(batches), float(stop.signal is not None)], dtype=torch.float64)
        )
        if stopped := bool(agreed[1]):
            break
        _step(run, batches, float(agreed[0]), clock)
        if schedule.eval_every and position.step % schedule.eval_every == 0 and run.valid_batches:
            _evaluate(run)
            clock.restart()
        if run.config.checkpoint.every and position.step % run.config.checkpoint.every == 0:
            save(run)
            saved = position.step
            clock.restart()
    if saved != position.step:
        save(run)
    return not stopped


def _step(run: Run, batches: Sequence[Batch], tokens: float, clock: "_Clock") -> None:
    config, position = run.config, run.state.position
    seed_step(config.runtime.seed, position.step, run.axis.rank)
    lr = learning_rate(config.schedule, config.optim.lr, position.step)
    loss = backward(run.state.model, batches, tokens, run.device)
    norm = update(run.state.weights, run.state.optimizer, run.axis, lr=lr, clip_norm=config.optim.clip_norm)
    position.step += 1
    position.samples += config.batch.global_batch
    position.tokens += int(tokens)
    if position.step % config.log.every == 0 or position.step in (1, config.schedule.steps):
        values = {"loss": float(run.axis.sum_(loss)), "lr": lr, "grad_norm": float(norm)}
        _emit(run, values | clock.lap())


def _evaluate(run: Run) -> None:
    assert run.valid_batches is not None
    batches = list(islice(run.valid_batches(), run.config.schedule.eval_batches * run.micro_batches))
    _emit(run, {"valid_loss": evaluate(run.state.model, batches, run.axis, run.device)})


def _emit(run: Run, values: dict[str, float | int]) -> None:
    position = run.state.position
    for sink in run.sinks:
        sink.write({"step": position.step, "samples": position.samples, "tokens": position.tokens, **values})


def save(run: Run) -> None:
    """Commit a checkpoint of the present step; the first rank writes, the others wait."""
    position = run.state.position
    run_dir = Path(run.config.runtime.run_dir)
    if run.axis.rank == 0:
        meta = {"step": position.step, "samples": position.samples, "tokens": position.tokens}
        meta["config"] = run.config.model_dump(mode="json")
        parts = {"model": run.state.model_tensors(), "optim": run.state.optimizer_tensors()}
        write(step_directory(run_dir, position.step), parts, meta, run.tokenizer_files)
        if run.config.checkpoint.keep:
            prune(run_dir, run.config.checkpoint.keep)
    run.axis.barrier()


class _Clock:
    """Time and tokens between two log lines, evaluations and checkpoints left out."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.restart()

    def restart(self) -> None:
        """Start a new interval."""
        self.start, self.step, self.tokens = self._now(), self.run.state.position.step, self.run.state.position.tokens

    def _now(self) -> float:
        if self.run.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def lap(self) -> dict[str, float | int]:
        """Speed since the last lap."""
        run, position = self.run, self.run.state.position
        seconds = (self._now() - self.start) / (position.step - self.step)
        tokens_per_s = (position.tokens - self.tokens) / (position.step - self.step) / seconds
        flops = run.config.model.flops_per_token(run.config.data.seq_length) * tokens_per_s / run.axis.size
        values: dict[str, float | int] = {
            "step_ms": seconds * 1e3,
            "tokens_per_s": tokens_per_s,
            "eta_s": seconds * (run.config.schedule.steps - position.step),
            "tflops_per_rank": flops / 1e12,
        }
        if run.device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            if peak := PEAK_FLOPS.get(torch.cuda.get_device_name()):
                values["share_of_peak"] = flops / peak
        self.restart()
        return values
