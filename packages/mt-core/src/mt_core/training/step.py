"""One optimizer step, and one evaluation: the only definition of the loss.

Loss = sum over valid tokens ÷ valid tokens of the whole step, over all micro-batches and ranks, so neither
micro-batches nor any kind of parallelism change it. A model that has a loss of each sample adds their mean over the
samples of the step; one without losses of tokens has that alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mt_core.contracts import Model
from mt_core.distributed.mesh import Axis, Mesh
from mt_core.parallel.data.grad_norm import all_reduce_partial_grads, compute_global_norm, compute_local_norms
from mt_core.parallel.data.protocol import DataParallel
from mt_core.parallel.pipeline.cut import Pipeline
from mt_core.parallel.pipeline.runtime import ScheduleRun
from mt_core.training.batch_inputs import Batch, prepare_inputs, valid_tokens
from mt_core.training.losses import LossSums, add_metrics, add_up_losses
from mt_core.training.optimizer_step import step_optimizer
from mt_core.training.pipelined_step import PipelinedPasses, PipelinedStep


class Update(NamedTuple):
    """The gradient norms of one update, on the model's device."""

    norm: Tensor
    """Norm of the whole gradient, before clipping."""
    local_norms: Tensor
    """Norms of the gradients of this rank's main parameters, in their order."""


class StepLosses(NamedTuple):
    """Loss and metrics of one step, summed over its backward passes on this rank."""

    loss: Tensor
    """This rank's share of the step's loss, in nats."""
    metrics: dict[str, Tensor]
    """By name, [total, weight] in fp64."""


def sum_losses(model: Model, batch: Batch, mesh: Mesh, device: torch.device) -> LossSums:
    """Sum up the losses and metrics of a micro-batch on this rank."""
    arguments, mask_BT = prepare_inputs(model, batch, mesh.context, device)
    return add_up_losses(model.losses(**arguments), mask_BT)


def reduce_metrics(mesh: Mesh, metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Return each metric over all ranks, total ÷ weight, unless its weight is 0. Every rank must call it."""
    metrics = _gather_metrics(mesh.pipeline, metrics)
    if not metrics:
        return {}
    names = sorted(metrics)
    sums = mesh.data_context.sum_(torch.stack([metrics[name] for name in names])).tolist()
    return {name: total / weight for name, (total, weight) in zip(names, sums, strict=True) if weight}


def _gather_metrics(pipeline: Axis, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add up the metrics of all stages, each of which may have others."""
    stages: list[Mapping[str, Tensor]] = [metrics] * pipeline.size
    if pipeline.size > 1:
        dist.all_gather_object(stages, {name: value.cpu() for name, value in metrics.items()}, group=pipeline.group)
    sums: dict[str, Tensor] = {}
    for each in stages:
        sums = add_metrics(sums, each)
    return sums


def count_samples(batches: Sequence[Batch]) -> int:
    """Count the samples in micro-batches; of those that have a label each, samples with label −1 do not count."""
    labels = [batch["labels"] for batch in batches]
    return sum(len(each) if each.dim() > 1 else int((each >= 0).sum()) for each in labels)


def backward(
    model: Model,
    data_parallel: DataParallel,
    batches: Sequence[Batch],
    tokens: float,
    device: torch.device,
    *,
    scale: float = 1.0,
    pipeline: Pipeline | None = None,
    update_heartbeat: Callable[[], None] = lambda: None,
) -> StepLosses:
    """Add up this rank's gradients of `scale` × the step's loss, over `tokens` of all ranks.

    With a pipeline, the micro-batches pass through the stages of all its ranks. `update_heartbeat` is called before
    each micro-batch, or before each pass through a stage.
    """
    total, metrics = torch.zeros((), device=device), {}
    samples = count_samples(batches) * data_parallel.mesh.data_context.size
    data_parallel.begin_step()
    if pipeline is not None:
        work = PipelinedStep(model, data_parallel, pipeline, batches, device, update_heartbeat)
        work.divide_losses(tokens, samples, scale)
        ScheduleRun(pipeline, work).run(pipeline.build_schedule(len(batches)))
        return StepLosses(work.loss, work.metrics)
    for number, batch in enumerate(batches, 1):
        update_heartbeat()
        if number == len(batches):
            data_parallel.last_backward()
        sums = sum_losses(model, batch, data_parallel.mesh, device)
        loss = sums.mean(tokens, samples)
        (loss * scale).backward()
        total, metrics = total + loss.detach(), add_metrics(metrics, sums.metrics)
    return StepLosses(total, metrics)


def reduce(data_parallel: DataParallel) -> None:
    """Make every main parameter's gradient that of the whole step, over all ranks."""
    data_parallel.reduce()
    all_reduce_partial_grads(data_parallel)


def update(
    data_parallel: DataParallel, optimizer: torch.optim.Optimizer, *, lr: float, clip_norm: float, scale: float = 1.0
) -> Update:
    """Clip the reduced gradients, step the optimizer, and gather the weights; a non-finite gradient changes none."""
    local_norms = compute_local_norms(data_parallel) / scale
    norm = compute_global_norm(data_parallel, local_norms)
    factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0) if clip_norm else torch.ones_like(norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    data_parallel.wait()  # the all-gather before may still read what the optimizer writes
    rounded = step_optimizer(optimizer, data_parallel.rounded_params, factor / scale, ~norm.isfinite())
    data_parallel.all_gather_params(rounded=rounded)
    return Update(norm, local_norms)


class EvaluationSums(NamedTuple):
    """What one rank has added up over batches."""

    losses: Tensor
    """fp64 on the CPU: losses of tokens and of samples, how many tokens and how many samples."""
    metrics: dict[str, Tensor]
    """By name, [total, weight] in fp64."""


@torch.no_grad()
def sum_evaluation(
    model: Model,
    batches: Sequence[Batch],
    mesh: Mesh,
    device: torch.device,
    *,
    pipeline: Pipeline | None = None,
    update_heartbeat: Callable[[], None] = lambda: None,
) -> EvaluationSums:
    """Add up the losses and metrics of these batches on this rank.

    `update_heartbeat` is called after each batch, or before each pass through a stage.
    """
    model.eval()
    tokens, samples = valid_tokens(batches) / mesh.context.size, float(count_samples(batches))
    token_losses, sample_losses, metrics = 0.0, 0.0, {}
    try:
        for sums in _evaluate(model, batches, mesh, device, pipeline, update_heartbeat):
            token_losses += 0.0 if sums.tokens is None else float(sums.tokens.double())
            sample_losses += 0.0 if sums.samples is None else float(sums.samples.double())
            metrics = add_metrics(metrics, sums.metrics)
    finally:
        model.train()
    losses = mesh.pipeline.sum_(torch.tensor([token_losses, sample_losses], dtype=torch.float64))
    return EvaluationSums(torch.cat([losses, losses.new_tensor([tokens, samples])]), metrics)


def reduce_evaluation(mesh: Mesh, parts: Sequence[EvaluationSums]) -> dict[str, float]:
    """Mean `loss` over the valid tokens and samples of all parts on all ranks, and the model's metrics by name.

    Every rank must call it.
    """
    totals, metrics = torch.zeros(4, dtype=torch.float64), {}
    for part in parts:
        totals, metrics = totals + part.losses, add_metrics(metrics, part.metrics)
    totals = mesh.data_context.sum_(totals)
    loss = float(totals[0] / totals[2].clamp(min=1.0) + totals[1] / totals[3].clamp(min=1.0))
    return {"loss": loss, **reduce_metrics(mesh, metrics)}


def evaluate(
    model: Model,
    batches: Sequence[Batch],
    mesh: Mesh,
    device: torch.device,
    *,
    pipeline: Pipeline | None = None,
    update_heartbeat: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """`sum_evaluation` of batches, reduced over all ranks."""
    sums = sum_evaluation(model, batches, mesh, device, pipeline=pipeline, update_heartbeat=update_heartbeat)
    return reduce_evaluation(mesh, [sums])


def _evaluate(
    model: Model,
    batches: Sequence[Batch],
    mesh: Mesh,
    device: torch.device,
    pipeline: Pipeline | None,
    update_heartbeat: Callable[[], None],
) -> Iterator[LossSums]:
    """The sums of each batch; with a pipeline, those of each pass through a stage."""
    if pipeline is None:
        for batch in batches:
            yield sum_losses(model, batch, mesh, device)
            update_heartbeat()
        return
    work = PipelinedPasses(model, pipeline, batches, device, update_heartbeat)
    ScheduleRun(pipeline, work).evaluate(len(batches))
    yield from work.sums
