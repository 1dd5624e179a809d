"""The training loop: steps, log lines, evaluations, checkpoints, and leaving in good order.

Between steps the ranks agree, in one small sum on the CPU, on the step's valid tokens and on whether one was asked to
stop; nothing else in a step waits for the GPU, but fp16's loss scale, which must know whether the gradient was finite.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch

from mt_core.checkpoint.async_save import AsyncWriter, SavedCheckpoint
from mt_core.config.run_config import RunConfig
from mt_core.contracts import MetricSink
from mt_core.distributed.heartbeat import Heartbeat
from mt_core.distributed.mesh import Mesh
from mt_core.errors import MtError
from mt_core.parallel.expert.balance import finish_routing
from mt_core.training.batch_inputs import (
    Batch,
    add_dropout_keys,
    check_equal_sizes,
    count_untrained,
    valid_tokens,
)
from mt_core.training.lr_schedule import learning_rate
from mt_core.training.metrics import ThroughputMeter
from mt_core.training.nonfinite import NonFiniteMonitor
from mt_core.training.seeds import seed_step
from mt_core.training.signals import GracefulStop
from mt_core.training.state import TrainState
from mt_core.training.step import (
    EvaluationSums,
    backward,
    reduce,
    reduce_evaluation,
    reduce_metrics,
    sum_evaluation,
    update,
)


@dataclass(frozen=True, slots=True)
class Run:
    """Everything the loop needs; `config` is the whole resolved tree."""

    config: RunConfig
    state: TrainState
    mesh: Mesh
    device: torch.device
    train_batches: Iterator[Batch]
    valid_batches: Mapping[str, Callable[[], Iterator[Batch]]]
    """What iterates over each validation set, by its name; one alone has none, "". Empty without validation."""
    sinks: Sequence[MetricSink]
    """Empty on every rank but the first."""
    writer: AsyncWriter
    global_batch: Callable[[int], int]
    """Samples of the step that begins after so many samples."""
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    meta: Mapping[str, Any] = field(default_factory=dict)
    """What checkpoints tell beside the state and the configuration, as plain values."""

    def micro_batches(self, global_batch: int) -> int:
        """Micro-batches of this rank in a step of so many samples."""
        return global_batch // (self.config.batch.micro_batch * self.mesh.data.size)


def train(run: Run, stop: GracefulStop) -> bool:
    """Train to the last step; False if a stop was asked for first: the state is saved then, too."""
    position, settings, every = run.state.position, run.config.train, run.config.checkpoint.every
    run.state.model.train()
    throughput = ThroughputMeter(run.config, position, run.device, run.mesh.world.size)
    nonfinite = NonFiniteMonitor(list(run.state.data_parallel.main_params), run.mesh)
    saved, stopped = position.step, False
    while position.step < settings.steps:
        run.heartbeat.update(position.step + 1, "data")
        global_batch = run.global_batch(position.samples)
        batches = list(islice(run.train_batches, run.micro_batches(global_batch)))
        assert len(batches) == run.micro_batches(global_batch), "the dataset is sized for the whole run"
        tokens, untrained, stopped = _agree(run, batches, stop)
        if stopped:
            break
        if untrained == global_batch and not run.mesh.world.rank:
            note = f"step {position.step + 1} has no token to learn in its {global_batch} samples"
            print(f"warning: {note}; a longer data.seq_length may reach the answers", file=sys.stderr, flush=True)
        _step(run, batches, tokens, nonfinite, throughput)
        _report(run, run.writer.poll())
        if settings.eval_every and position.step % settings.eval_every == 0 and run.valid_batches:
            _evaluate(run)
            throughput.restart()
        if every and position.step % every == 0:
            _check_finite(run, nonfinite)
            save(run)
            saved = position.step
            throughput.restart()
    _check_finite(run, nonfinite)
    if saved != position.step and (stopped or run.config.checkpoint.at_end):
        save(run)
    run.heartbeat.update(position.step, "save")
    _report(run, run.writer.wait())
    return not stopped


def _agree(run: Run, batches: Sequence[Batch], stop: GracefulStop) -> tuple[float, int, bool]:
    """The step's valid tokens, its samples without any, and whether any rank was asked to stop."""
    _check_sizes(run, batches)
    counts = [valid_tokens(batches), count_untrained(batches), float(stop.signal is not None)]
    sums = torch.tensor(counts, dtype=torch.float64)
    run.mesh.world.sum_(sums)
    copies = run.mesh.context.size * run.mesh.tensor.size * run.mesh.pipeline.size
    return float(sums[0]) / copies, round(float(sums[1]) / copies), bool(sums[2])


def _check_sizes(run: Run, batches: Sequence[Batch]) -> None:
    """Refuse micro-batches of unequal sizes where ranks gather each other's tokens, which would wait or mix them up."""
    if run.config.parallel.token_dispatcher == "all_gather":
        check_equal_sizes(batches, run.mesh.world)


def _step(
    run: Run, batches: Sequence[Batch], tokens: float, nonfinite: NonFiniteMonitor, throughput: ThroughputMeter
) -> None:
    config, state, position = run.config, run.state, run.state.position
    seed_step(config.runtime.seed, position.step, run.mesh.data_context.rank)
    batches = add_dropout_keys(batches, config.runtime.seed, consumed=position.samples, data=run.mesh.data)
    schedule, peak, steps = config.lr_schedule, config.optim.lr, config.train.steps
    lr = learning_rate(schedule, peak, position.step, samples=position.samples, steps=steps)
    scale = state.loss_scale.value
    update_heartbeat = partial(run.heartbeat.update, position.step + 1, "forward and backward")
    loss, metrics = backward(
        state.model,
        state.data_parallel,
        batches,
        tokens,
        run.device,
        scale=scale,
        pipeline=state.pipeline,
        update_heartbeat=update_heartbeat,
    )
    run.heartbeat.update(position.step + 1, "reduce")
    reduce(state.data_parallel)
    run.heartbeat.update(position.step + 1, "optimizer")
    updated = update(state.data_parallel, state.optimizer, lr=lr, clip_norm=config.optim.clip_norm, scale=scale)
    routing = finish_routing(state.model, run.mesh, updated.norm.isfinite())
    position.step += 1
    position.samples += run.global_batch(position.samples)
    position.tokens += int(tokens)
    if not state.loss_scale.searches(config.precision):
        nonfinite.record_step(position.step, loss, updated)
    if config.precision.dtype == "fp16":
        state.loss_scale.after_step(config.precision, finite=bool(updated.norm.isfinite()))
    if position.step % config.log.every == 0 or position.step in (1, config.train.steps):
        _check_finite(run, nonfinite)
        values = {"loss": float(run.mesh.sum_over_losses_(loss)), "lr": lr, "grad_norm": float(updated.norm)}
        values = reduce_metrics(run.mesh, metrics) | {name: float(value) for name, value in routing.items()} | values
        values |= {"loss_scale": scale} if config.precision.dtype == "fp16" else {}
        _emit(run, values | throughput.lap())


def _check_finite(run: Run, nonfinite: NonFiniteMonitor) -> None:
    """Report bad steps since the last check, and end the run over them unless it skips them."""
    for line in nonfinite.pop_bad_steps():
        if run.config.optim.nonfinite == "stop":
            allowed = "look at the data and the learning rate; optim.nonfinite = skip leaves such steps out"
            raise MtError("gradient", f"not finite in {line}", allowed)
        if run.mesh.world.rank == 0:
            print(f"mt: left out {line}", file=sys.stderr, flush=True)


def _evaluate(run: Run) -> None:
    update_heartbeat = partial(run.heartbeat.update, run.state.position.step, "evaluate")
    update_heartbeat()
    count = run.config.train.eval_batches * run.micro_batches(run.config.batch.global_batch)
    state, parts = run.state, dict[str, EvaluationSums]()
    keywords = {"pipeline": state.pipeline, "update_heartbeat": update_heartbeat}
    for name, iterate in run.valid_batches.items():
        batches = list(islice(iterate(), count))
        _check_sizes(run, batches)
        parts[name] = sum_evaluation(state.model, batches, run.mesh, run.device, **keywords)
    values = reduce_evaluation(run.mesh, [*parts.values()])
    for name, part in parts.items() if len(parts) > 1 else ():
        values |= {f"{name}_{metric}": value for metric, value in reduce_evaluation(run.mesh, [part]).items()}
    _emit(run, {f"valid_{name}": value for name, value in values.items()})


def _emit(run: Run, values: dict[str, float | int]) -> None:
    position = run.state.position
    for sink in run.sinks:
        sink.write({"step": position.step, "samples": position.samples, "tokens": position.tokens, **values})


def save(run: Run) -> None:
    """Save the present step; with `checkpoint.async_save` the files are written while training goes on."""
    state = run.state
    run.heartbeat.update(state.position.step, "save")
    meta = state.meta() | dict(run.meta) | {"config": run.config.model_dump(mode="json")}
    _report(run, run.writer.save(state.position.step, state.parts(), meta))
    if not run.config.checkpoint.async_save:
        _report(run, run.writer.wait())
    run.heartbeat.update(state.position.step, "saved")


def _report(run: Run, saved: SavedCheckpoint | None) -> None:
    if saved is not None:
        seconds = {"save_pause_s": saved.pause_s, "save_write_s": saved.write_s, "save_wait_s": saved.waited_s}
        _emit(run, {"saved_step": saved.step, "save_bytes": saved.total_bytes or saved.rank_bytes, **seconds})
