"""One optimizer step, and one evaluation: the only definition of the loss.

Loss = sum over valid tokens ÷ valid tokens of the whole step, over all micro-batches and ranks, so neither
micro-batches nor any kind of parallelism change it. A model that has a loss of each sample adds their mean over the
samples of the step; one without losses of tokens has that alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mt_core.contracts import Losses, MetricSum, Model
from mt_core.distributed.mesh import Mesh
from mt_core.parallel.data.grad_norm import all_reduce_partial_grads, compute_global_norm, compute_local_norms
from mt_core.parallel.data.protocol import DataParallel
from mt_core.training.batch_inputs import Batch, prepare_inputs, valid_tokens


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


class LossSums(NamedTuple):
    """Sums over one micro-batch on this rank, in nats."""

    tokens: Tensor | None
    """The losses of its valid tokens; None if the model has no losses of tokens."""
    samples: Tensor | None
    """The losses of its samples; None if the model has none."""
    metrics: dict[str, Tensor]
    """By name, [total, weight] in fp64."""

    def mean(self, tokens: float, samples: float) -> Tensor:
        """Return this micro-batch's part of the mean over `tokens` tokens plus the mean over `samples` samples."""
        parts = [] if self.tokens is None else [self.tokens / max(tokens, 1.0)]
        parts += [] if self.samples is None else [self.samples / samples]
        assert parts, "a model has losses of tokens, of samples or of both"
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def sum_losses(model: Model, batch: Batch, mesh: Mesh, device: torch.device) -> LossSums:
    """Sum up the losses and metrics of a micro-batch on this rank."""
    arguments, mask_BT = prepare_inputs(model, batch, mesh.context, device)
    losses: Losses = model.losses(**arguments)
    tokens, samples, metrics = losses.tokens, losses.samples, {**losses.metrics}
    if tokens is not None:
        valid_BT = torch.ones_like(tokens) if mask_BT is None else mask_BT.to(tokens.dtype)
        tokens = (tokens * valid_BT).sum()
        metrics |= _name_sum(losses.tokens_name, tokens, valid_BT)
    if samples is not None:
        weights_B, samples = torch.ones_like(samples), samples.sum()
        metrics |= _name_sum(losses.samples_name, samples, weights_B)
    sums = {name: torch.stack((m.total, m.weight)).detach().double() for name, m in metrics.items()}
    return LossSums(tokens, samples, sums)


def _name_sum(name: str | None, total: Tensor, weights: Tensor) -> dict[str, MetricSum]:
    """The metric of a named sum."""
    return {} if name is None else {name: MetricSum(total, weights.sum(dtype=torch.float64).to(total.dtype))}


def add_metrics(sums: dict[str, Tensor], metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the metrics of one more micro-batch to the sums."""
    return sums | {name: sums[name] + value if name in sums else value for name, value in metrics.items()}


def reduce_metrics(mesh: Mesh, metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Return each metric over all ranks, total ÷ weight, unless its weight is 0. Every rank must call it."""
    if not metrics:
        return {}
    names = sorted(metrics)
    sums = mesh.data_context.sum_(torch.stack([metrics[name] for name in names])).tolist()
    return {name: total / weight for name, (total, weight) in zip(names, sums, strict=True) if weight}


def count_samples(batches: Sequence[Batch]) -> int:
    """Count the samples in micro-batches."""
    return sum(len(batch["labels"]) for batch in batches)


def backward(
    model: Model,
    data_parallel: DataParallel,
    batches: Sequence[Batch],
    tokens: float,
    device: torch.device,
    *,
    scale: float = 1.0,
    update_heartbeat: Callable[[], None] = lambda: None,
) -> StepLosses:
    """Add up this rank's gradients of `scale` × the step's loss, over `tokens` of all ranks.

    `update_heartbeat` is called before each micro-batch.
    """
    total, metrics = torch.zeros((), device=device), {}
    samples = count_samples(batches) * data_parallel.mesh.data_context.size
    data_parallel.begin_step()
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
    _step(optimizer, factor / scale, ~norm.isfinite())
    data_parallel.all_gather_params()
    return Update(norm, local_norms)


def _step(optimizer: Any, factor: Tensor, bad: Tensor) -> None:
    """Step with gradients × factor, unless they are bad; torch's fused kernels do both without waiting for the GPU."""
    fused = optimizer.defaults.get("fused")
    if fused and factor.dtype == torch.float32:
        optimizer.grad_scale = factor.reciprocal()
    else:
        for group in optimizer.param_groups:
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            if gradients:  # a rank may have no main parameter
                torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
    if fused:
        optimizer.found_inf = bad.float()
    if fused or not bad:
        optimizer.step()


@torch.no_grad()
def evaluate(
    model: Model,
    batches: Sequence[Batch],
    mesh: Mesh,
    device: torch.device,
    *,
    update_heartbeat: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Mean `loss` over the valid tokens and samples of these batches on all ranks, and the model's metrics by name.

    `update_heartbeat` is called after each batch.
    """
    model.eval()
    tokens, samples = valid_tokens(batches) / mesh.context.size, float(count_samples(batches))
    token_losses, sample_losses, metrics = 0.0, 0.0, {}
    try:
        for batch in batches:
            sums = sum_losses(model, batch, mesh, device)
            token_losses += 0.0 if sums.tokens is None else float(sums.tokens.double())
            sample_losses += 0.0 if sums.samples is None else float(sums.samples.double())
            metrics = add_metrics(metrics, sums.metrics)
            update_heartbeat()
    finally:
        model.train()
    totals = mesh.data_context.sum_(torch.tensor([token_losses, tokens, sample_losses, samples], dtype=torch.float64))
    loss = float(totals[0] / max(totals[1], 1.0) + totals[2] / totals[3])
    return {"loss": loss, **reduce_metrics(mesh, metrics)}
