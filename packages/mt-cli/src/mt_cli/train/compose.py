"""From a resolved configuration to a running training loop: the one readable path through all packages."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mt_cli.train.run_directory import prepare
from mt_cli.train.view import screen
from mt_core.checkpoint.native import resolve, steps
from mt_core.errors import MtError
from mt_core.parallel.axis import Axis
from mt_core.parallel.launch import data_axis, local_ranks, pick_device
from mt_core.plugins import component
from mt_core.training.loop import Run, train
from mt_core.training.metrics import open_sinks
from mt_core.training.optimizer import parameter_groups
from mt_core.training.state import Position, TrainState
from mt_core.training.step import Batch
from mt_core.training.stop import stop_requests
from mt_core.training.weights import DTYPES, Weights
from mt_core.types import MetricSink
from mt_data.torch import batches


def run(config: Any) -> int:
    """Train as `config` says; the exit code: 0, or 128 + the signal that ended the run early, its state saved."""
    device = pick_device(config.runtime.device)
    run_dir = Path(config.runtime.run_dir)
    with ExitStack() as stack:
        axis = stack.enter_context(data_axis(device))
        stop = stack.enter_context(stop_requests(insistent=axis.size == 1))
        torch.set_num_threads(config.runtime.threads or max(1, (os.cpu_count() or 1) // local_ranks()))
        check_ranks(config, axis)
        tokenizer_files = prepare(run_dir, config) if axis.rank == 0 else []
        train_batches, valid_batches = open_data(config, run_dir, axis)
        state = restore(build_state(config, device, resume=bool(steps(run_dir))), run_dir, axis)
        sinks = start_sinks(config, state.position.step, stack) if axis.rank == 0 else []
        training = Run(
            config=config,
            state=state,
            axis=axis,
            device=device,
            train_batches=train_batches(consumed=state.position.samples),
            valid_batches=valid_batches,
            sinks=sinks,
            tokenizer_files=tokenizer_files,
        )
        code = 0 if train(training, stop) else stop.exit_code
    if axis.rank == 0:
        print(f"mt: step {state.position.step} of {config.schedule.steps} is in {steps(run_dir)[-1]}", file=sys.stderr)
    return code


def restore(state: TrainState, run_dir: Path, axis: Axis) -> TrainState:
    """Go on from the latest checkpoint of the run directory, if there is one."""
    if committed := steps(run_dir):
        if axis.rank == 0:
            print(f"mt: resuming from {committed[-1]}", file=sys.stderr)
        state.load(resolve(committed[-1]))
    return state


def start_sinks(config: Any, step: int, stack: ExitStack) -> list[MetricSink]:
    """All receivers of metrics; `stack` closes them."""
    sinks = open_sinks(Path(config.runtime.run_dir), config.log.sinks, step, screen(config.schedule.steps))
    for sink in sinks:
        stack.callback(sink.close)
    return sinks


def check_ranks(config: Any, axis: Axis) -> None:
    """Refuse a number of ranks that the configuration or the batch does not fit."""
    if config.parallel.data not in (None, axis.size):
        raise MtError("parallel.data", f"{config.parallel.data}, but {axis.size} ranks run", f"allowed: {axis.size}")
    unit = config.batch.micro_batch * axis.size
    if config.batch.global_batch % unit:
        found = f"{config.batch.global_batch} is no multiple of micro_batch × ranks = {unit}"
        raise MtError("batch.global_batch", found, f"allowed: {-(-config.batch.global_batch // unit) * unit}")


def open_data(
    config: Any, run_dir: Path, axis: Axis
) -> tuple[Callable[..., Iterator[Batch]], Callable[[], Iterator[Batch]] | None]:
    """Functions that iterate over this rank's training micro-batches (from `consumed=`) and validation ones."""
    schedule, batch = config.schedule, config.batch
    samples = (
        schedule.steps * batch.global_batch,
        schedule.eval_batches * batch.global_batch if schedule.eval_every else 0,
        0,
    )
    cache = Path(config.data.cache_dir) if config.data.cache_dir else run_dir / "index-cache"
    build = component("dataset", config.data.kind)
    splits = build(config.data, samples=samples, seed=config.runtime.seed, cache_dir=cache, builder=axis.rank == 0)
    iterate = partial(
        batches,
        micro_batch=batch.micro_batch,
        data_rank=axis.rank,
        data_size=axis.size,
        workers=config.data.loader_workers,
        vocab_size=config.model.vocab_size,
    )
    return partial(iterate, splits.train), partial(iterate, splits.valid, consumed=0) if splits.valid else None


def build_state(config: Any, device: torch.device, *, resume: bool) -> TrainState:
    """Model, weights and optimizer at step 0: initialised from the seed or, if this is no resume, from a checkpoint."""
    with device:
        model = config.model.build().to(DTYPES["fp64" if config.precision.dtype == "fp64" else "fp32"])
    if config.checkpoint.init and not resume:
        load_weights(model, config.checkpoint.init)
    elif not resume:
        model.initialize(config.runtime.seed)
    weights = Weights(model, DTYPES[config.precision.dtype])
    if config.runtime.compile:
        for block in model.layers.values():
            block.compile()
    groups = parameter_groups(weights.masters, config.optim.weight_decay)
    optimizer = component("optimizer", config.optim.name)(groups, config.optim)
    return TrainState(model, weights, optimizer, Position())


def load_weights(model: Any, init: str) -> None:
    """Fill a model from `LOADER:PATH`; a checkpoint of another shape is refused with all differences."""
    from mt_models.canonical import load_stream

    name, _, path = init.partition(":")
    load_stream(model, component("ckpt-loader", name)(Path(path)).tensors())
