"""From a resolved configuration to a running training loop: the one readable path through all packages."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatch
from functools import partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType

import torch
import torch.distributed as dist

from mt_cli.rules import list_schedule_problems
from mt_cli.run_config import FullConfig
from mt_cli.train.report import RunSummary, describe_start, print_rows, report_end
from mt_cli.train.resume import (
    DATA_RANKS,
    PLANNED,
    ResumePoint,
    change_problems,
    find_resume_point,
    plan_samples,
)
from mt_cli.train.run_directory import INDEX_CACHE, open_run_directory, prepare_files, record_config, report_resume
from mt_cli.train.view import screen
from mt_core.checkpoint.async_save import AsyncWriter
from mt_core.checkpoint.commit_protocol import Ranks
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.checkpoint.native import step_directory, steps
from mt_core.config.sections import PrecisionConfig
from mt_core.contracts import MetricSink
from mt_core.distributed.environment import get_rank_info, is_supervised_by_mt
from mt_core.distributed.heartbeat import Heartbeat
from mt_core.distributed.mesh import Mesh, make_mesh
from mt_core.distributed.process_group import local_ranks, pick_device, process_group, use_deterministic_kernels
from mt_core.distributed.topology import resolve_dims
from mt_core.errors import raise_if
from mt_core.parallel.apply import parallelize
from mt_core.plugins import component
from mt_core.training.batch_inputs import Batch
from mt_core.training.loop import Run, train
from mt_core.training.loss_scale import LossScale
from mt_core.training.metrics import open_sinks
from mt_core.training.optimizer import parameter_groups
from mt_core.training.signals import catch_stop_signals
from mt_core.training.state import TrainState
from mt_data.batching.batch_sizes import check_sizes, make_batch_sizes
from mt_data.batching.loading import fill_up, load_batches
from mt_models.canonical import fit_heads, stream_parameters
from mt_models.config.lora import ADAPTERS


def set_threads(count: int | None) -> None:
    """Let this rank use so many CPU threads; if None, those of OMP_NUM_THREADS, or its share of the cores."""
    if count is None and "OMP_NUM_THREADS" in os.environ:
        return  # torch has read it
    torch.set_num_threads(count or max(1, (os.cpu_count() or 1) // local_ranks()))


def run(config: FullConfig, *, allow_change: bool = False) -> int:
    """Train as `config` says; the exit code: 0, or 128 + the signal that ended the run early, its state saved.

    A run that has trained all its steps says so. `allow_change` lets one go on whose samples will have another order.
    """
    use_deterministic_kernels(config.runtime.deterministic)
    device = pick_device(config.runtime.device)
    run_dir, first = Path(config.runtime.run_dir), get_rank_info().rank == 0
    with open_run_directory(run_dir, first=first, launched=is_supervised_by_mt()) as start:
        with ExitStack() as stack:
            heartbeat = stack.enter_context(process_group(device, run_dir, config.runtime.stall_timeout))
            mesh = make_mesh(resolve_dims(config.parallel, get_rank_info().world_size))
            stop = stack.enter_context(catch_stop_signals(insistent=mesh.world.size == 1))
            set_threads(config.runtime.threads)
            check_sizes(make_batch_sizes(config.batch), config.batch.micro_batch * mesh.data.size)
            raise_if(list_schedule_problems(config, mesh.data.size))
            point = find_resume_point(run_dir)
            if point is not None and first:
                raise_if(change_problems(point, config, mesh.data.size, allow=allow_change))
            complete = point is not None and point.step >= config.train.steps
            training: Run | None = None
            if point is not None and complete:
                step, code = point.step, 0
            else:
                planned = plan_samples(point, config, allow=allow_change)
                training = make_run(
                    config, mesh, device, heartbeat=heartbeat, point=point, planned=planned, stack=stack
                )
                start.keep.add(INDEX_CACHE)  # whole: the next start reads it
                try:
                    code = 0 if train(training, stop) else stop.exit_code
                finally:
                    step = training.state.position.step
                    start.done = step > (point.step if point else 0)
        last = step_directory(run_dir, step)
        if first and last in steps(run_dir):
            if complete:
                reached = f"{last} has reached step {step}, train.steps is {config.train.steps}"
                print(f"mt: the run is complete: {reached}; raise it to train on", file=sys.stderr)
            else:
                print(f"mt: step {step} of {config.train.steps} is in {last}", file=sys.stderr)
            if training is not None:
                report_end(config, training.sinks, step, device)
            if code == 0 and config.checkpoint.save_format != "native":
                save_as(config.checkpoint.save_format, last, run_dir)
    return code


def make_run(
    config: FullConfig,
    mesh: Mesh,
    device: torch.device,
    *,
    heartbeat: Heartbeat,
    point: ResumePoint | None,
    planned: tuple[int, ...],
    stack: ExitStack,
) -> Run:
    """Everything that the loop needs, at the position from which it goes on; `stack` closes it.

    `planned` are the numbers of training samples that `plan_samples` returns.
    """
    run_dir, first = Path(config.runtime.run_dir), mesh.world.rank == 0
    if first and point is not None:
        report_resume(point, config)
    tokenizer_files = prepare_files(run_dir, config, resumed=point is not None) if first else []
    train_batches, valid_batches = open_data(config, run_dir, mesh, planned)
    state = restore(build_state(config, mesh, device, resume=point is not None), point, config.precision)
    if first:
        print_rows(describe_start(config, state.model, mesh, device))
    sinks = start_sinks(config, state.position.step, stack) if first else []
    writer = open_writer(config, state, tokenizer_files)
    stack.callback(writer.wait)  # a save in flight is committed whatever ends the run
    if first:
        record_config(run_dir, config, state.position.step, resumed=point is not None)
    return Run(
        config=config,
        state=state,
        mesh=mesh,
        device=device,
        heartbeat=heartbeat,
        train_batches=train_batches(consumed=state.position.samples),
        valid_batches=valid_batches,
        sinks=sinks,
        writer=writer,
        global_batch=make_batch_sizes(config.batch).size_after,
        meta={PLANNED: list(planned), DATA_RANKS: mesh.data.size},
    )


def save_as(format: str, step: Path, run_dir: Path) -> None:
    """Write a step in another format to RUN/FORMAT, in place of what an earlier run left there."""
    source, target = open_checkpoint(step, "native"), run_dir / format
    new = target.with_name(f".{format}.new")
    shutil.rmtree(new, ignore_errors=True)
    component("ckpt-saver", format)(new, source.config(), source.tensors(), source.tokenizer_files())
    shutil.rmtree(target, ignore_errors=True)
    new.rename(target)
    print(f"mt: in {format} format it is in {target}", file=sys.stderr)


def restore(state: TrainState, point: ResumePoint | None, precision: PrecisionConfig) -> TrainState:
    """Go on from a checkpoint, if there is one."""
    if point is None:
        return state
    start = time.perf_counter()
    state.load(point.path, precision)
    if state.data_parallel.mesh.world.rank == 0 and (seconds := time.perf_counter() - start) > 2:
        print(f"mt: loaded in {seconds:.1f} s", file=sys.stderr)
    return state


def start_sinks(config: FullConfig, step: int, stack: ExitStack) -> list[MetricSink]:
    """All receivers of metrics; `stack` closes them."""
    sinks = open_sinks(Path(config.runtime.run_dir), config.log.sinks, step, screen(config.train.steps))
    sinks.append(RunSummary())
    for sink in sinks:
        stack.callback(sink.close)
    return sinks


def open_writer(config: FullConfig, state: TrainState, tokenizer_files: Sequence[Path]) -> AsyncWriter:
    """The writer of this rank's share of every checkpoint."""
    session, world = [f"{os.getpid()}-{time.time_ns()}"], state.data_parallel.mesh.world
    if world.size > 1:
        dist.broadcast_object_list(session)
    ranks = Ranks(world.rank, world.size, session[0], config.runtime.stall_timeout)
    run_dir, keep = Path(config.runtime.run_dir), config.checkpoint.keep or 0
    writer = AsyncWriter(run_dir, ranks, tokenizer_files=tokenizer_files, keep=keep)
    if config.checkpoint.async_save and state.data_parallel.device.type == "cuda":
        writer.reserve(state.owned_bytes())
    return writer


def open_data(
    config: FullConfig, run_dir: Path, mesh: Mesh, planned: tuple[int, ...]
) -> tuple[Callable[..., Iterator[Batch]], Mapping[str, Callable[[], Iterator[Batch]]]]:
    """Functions that iterate over this rank's training micro-batches, from `consumed=`, and over validation sets."""
    train, batch = config.train, config.batch
    *before, wanted = planned
    samples = (
        planned if before else wanted,  # kinds of other packages take a number
        train.eval_batches * batch.global_batch if train.eval_every else 0,
        0,
    )
    cache = Path(config.data.cache_dir) if config.data.cache_dir else run_dir / "index-cache"
    build = component("dataset", config.data.kind)
    first = mesh.world.rank == 0
    splits = build(config.data, samples=samples, seed=config.runtime.seed, cache_dir=cache, builder=first)
    iterate = partial(
        load_batches,
        micro_batch=batch.micro_batch,
        data_rank=mesh.data.rank,
        data_size=mesh.data.size,
        workers=config.data.loader_workers,
        prefetch=config.data.prefetch,
        vocab_size=config.model.vocab_size,
    )
    train_batches = partial(iterate, splits.train, order=config.data.order)
    sets = {name: fill_up(dataset, batch.global_batch) for name, dataset in splits.valid_sets.items()}
    sets |= {"": splits.valid} if splits.valid else {}
    return train_batches, {name: partial(iterate, dataset, consumed=0) for name, dataset in sets.items()}


def build_state(config: FullConfig, mesh: Mesh, device: torch.device, *, resume: bool) -> TrainState:
    """Model, weights and optimizer at step 0: initialised from the seed or, if this is no resume, from a checkpoint."""
    model, data_parallel, pipeline = parallelize(config, mesh, device)
    groups = parameter_groups(data_parallel.main_params, data_parallel.shapes, config.optim.weight_decay)
    optimizer = component("optimizer", config.optim.name)(groups, config.optim)
    scale = LossScale.initial(config.precision)
    state = TrainState(model, data_parallel, optimizer, loss_scale=scale, pipeline=pipeline)
    if config.checkpoint.init and not resume:
        load_weights(state, config.checkpoint.init, config.checkpoint.init_options, seed=config.runtime.seed)
    elif not resume:
        state.initialize(config.runtime.seed)
    return state


def load_weights(
    state: TrainState, init: str, options: Mapping[str, object] = MappingProxyType({}), *, seed: int = 0
) -> None:
    """Fill a model from `LOADER:PATH`, tensor by tensor; another shape is refused with all differences. Adapters that
    the checkpoint's model has not got are drawn from the seed.

    So are heads of a task that it lacks, and those that the model lacks are left out; a line on stderr names both.
    """
    name, _, path = init.partition(":")
    checkpoint = open_checkpoint(Path(path), name, options)
    missing = state.model.config.canonical_shapes().keys() - checkpoint.config().canonical_shapes().keys()
    fresh = ((each, state.model.initial(seed, each)) for each in sorted(missing) if fnmatch(each, ADAPTERS))
    tell = print_note if state.data_parallel.mesh.world.rank == 0 else lambda note: None
    with state.filling() as fill:
        stream_parameters(state.model, fit_heads(state.model, chain(checkpoint.tensors(), fresh), seed, tell), fill)


def print_note(note: str) -> None:
    """Print a line on stderr."""
    print(f"mt: {note}", file=sys.stderr, flush=True)
