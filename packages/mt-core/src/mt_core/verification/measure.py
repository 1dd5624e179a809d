"""A short run of a configuration on random tokens, recorded in whole canonical tensors."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mt_core.checkpoint.gather import gather_whole
from mt_core.config.run_config import RunConfig
from mt_core.distributed.mesh import Mesh, make_mesh
from mt_core.distributed.topology import resolve_dims
from mt_core.parallel.apply import parallelize
from mt_core.parallel.expert.balance import finish_routing
from mt_core.plugins import component
from mt_core.training.batch_inputs import Batch, add_dropout_keys
from mt_core.training.loss_scale import LossScale
from mt_core.training.optimizer import parameter_groups
from mt_core.training.seeds import derived_seed
from mt_core.training.state import TrainState
from mt_core.training.step import backward, reduce, reduce_metrics, update

NamedTensors = dict[str, Tensor]


@dataclass(slots=True)
class Record:
    """What one run computed, step by step; tensors are on the first rank alone."""

    losses: list[float]
    norms: list[float]
    gradients: list[NamedTensors]
    """Gradients of each step, or of the first ones alone, under canonical names, before clipping."""
    weights: NamedTensors
    """After the last step."""
    metrics: list[dict[str, float]] = field(default_factory=list)
    """What the model reports beside the loss, by name, of each step over all ranks."""


def measure(
    config: RunConfig,
    ranks: int,
    *,
    steps: int = 3,
    gradient_steps: int | None = None,
    documents: bool = False,
    start: Path | None = None,
    save: Path | None = None,
) -> Record:
    """Run `steps` steps on the CPU as one of `ranks` joined ranks; every rank must call it.

    Gradients are recorded in the first `gradient_steps` steps, by default in all: gathering them is a third of a step.
    `documents` cuts the sequences into documents that do not see each other, with padding at the end. `start` is a
    checkpoint to go on from, `save` a run directory to save the end in.
    """
    mesh, device = make_mesh(resolve_dims(config.parallel, ranks)), torch.device("cpu")
    model, data_parallel, pipeline = parallelize(config, mesh, device)
    groups = parameter_groups(data_parallel.main_params, data_parallel.shapes, config.optim.weight_decay)
    optimizer = component("optimizer", config.optim.name)(groups, config.optim)
    scale = LossScale.initial(config.precision)
    state = TrainState(model, data_parallel, optimizer, loss_scale=scale, pipeline=pipeline)
    if start is None:
        state.initialize(config.runtime.seed)
    else:
        state.load(start, config.precision)
    record = Record([], [], [], {})
    for number in range(steps):
        _step(config, state, record, documents=documents, gradients=gradient_steps is None or number < gradient_steps)
    record.weights = gather_state(state, "weight")
    if save is not None:
        save_state(config, state, save)
    return record


def _step(config: RunConfig, state: TrainState, record: Record, *, documents: bool, gradients: bool) -> None:
    data_parallel, mesh, scale = state.data_parallel, state.data_parallel.mesh, state.loss_scale.value
    batches = list(random_batches(config, mesh, state.position.step, documents=documents))
    tokens = config.batch.global_batch * config.data.seq_length
    pipeline, device = state.pipeline, torch.device("cpu")
    loss, metrics = backward(state.model, data_parallel, batches, tokens, device, scale=scale, pipeline=pipeline)
    reduce(data_parallel)
    record.metrics.append(reduce_metrics(mesh, metrics))
    if gradients:
        record.gradients.append({name: g / scale for name, g in gather_state(state, "gradient").items()})
    updated = update(data_parallel, state.optimizer, lr=config.optim.lr, clip_norm=config.optim.clip_norm, scale=scale)
    finish_routing(state.model, mesh, updated.norm.isfinite())
    data_parallel.wait()
    state.position.step += 1
    record.losses.append(float(mesh.sum_over_losses_(loss.double())))
    record.norms.append(float(updated.norm))


def random_batches(config: RunConfig, mesh: Mesh, step: int, *, documents: bool) -> Iterator[Batch]:
    """This rank's micro-batches of a step: the same samples, with the same dropout, whatever the layout."""
    samples, length = config.batch.global_batch, config.data.seq_length
    generator = torch.Generator().manual_seed(derived_seed(config.runtime.seed, "verify", step))
    ids = torch.randint(config.model.vocab_size, (samples, length + 1), generator=generator)
    batch = {"labels": ids[:, 1:], "loss_mask": torch.ones(samples, length)}
    if documents:
        ends = torch.rand(samples, length, generator=generator) < 4 / length
        number = ends.cumsum(-1)
        starts = torch.arange(length) - torch.where(ends, torch.arange(length), 0).cummax(-1).values
        ends = torch.randint(length // 2, length + 1, (samples, 1), generator=generator)
        batch |= {"segment_ids": number, "position_ids": starts, "padding_mask": (torch.arange(length) < ends).long()}
    batch |= config.model.random_inputs(ids[:, :-1], generator)
    micro = config.batch.micro_batch
    local = [
        {name: tensor[first : first + micro] for name, tensor in batch.items()}
        for first in range(mesh.data.rank * micro, samples, mesh.data.size * micro)
    ]
    yield from add_dropout_keys(local, config.runtime.seed, consumed=step * samples, data=mesh.data)


@torch.no_grad()
def gather_state(state: TrainState, what: Literal["weight", "gradient"]) -> NamedTensors:
    """Gather all weights (trained ones from their main parameters) or all gradients, whole, on the first rank."""
    tensors: NamedTensors = {}
    data_parallel, wide = state.data_parallel, torch.promote_types(state.data_parallel.dtype, torch.float32)
    for name, parameter in state.model.named_parameters():
        if not parameter.requires_grad and what == "gradient":
            assert parameter.grad is None, f"{name} is frozen"
            continue
        part, dtype = data_parallel.main_params.get(name), wide
        if not parameter.requires_grad:
            part, dtype = data_parallel.frozen.get(name), data_parallel.dtype
        elif part is not None and what == "gradient":
            part = part.grad
        whole = gather_whole(state.model, data_parallel, name, part, data_parallel.mesh.stage_ranks[0], dtype=dtype)
        tensors |= {canonical: tensor.detach().clone() for canonical, tensor in whole}
    buffers = state.stored_buffers() if what == "weight" else {}
    tensors |= {name: buffer.detach().clone() for name, buffer in buffers.items()}
    return _gather_stages(data_parallel.mesh, tensors)


def _gather_stages(mesh: Mesh, tensors: NamedTensors) -> NamedTensors:
    """Gather the tensors of all stages on the first rank; those that several stages have must be equal."""
    if mesh.pipeline.size == 1 or mesh.world.rank != mesh.stage_ranks[0]:
        return tensors
    stages: list[NamedTensors] = [{}] * mesh.pipeline.size
    dist.all_gather_object(stages, tensors, group=mesh.pipeline.group)
    whole: NamedTensors = {}
    for each in stages:
        for name, tensor in each.items():
            assert name not in whole or torch.equal(whole[name], tensor), f"{name} differs between stages"
            whole[name] = tensor
    return {name: whole[name] for name in sorted(whole)} if mesh.pipeline.rank == 0 else {}


def save_state(config: RunConfig, state: TrainState, run: Path) -> None:
    """A native checkpoint of the present step."""
    from mt_core.checkpoint.async_save import AsyncWriter
    from mt_core.checkpoint.commit_protocol import Ranks

    world = state.data_parallel.mesh.world
    writer = AsyncWriter(run, Ranks(world.rank, world.size, "verify"))
    writer.save(state.position.step, state.parts(), state.meta() | {"config": config.model_dump(mode="json")})
    writer.wait()
