"""Replicated weights with flat buckets of gradients: plain data parallelism and, with a shard axis, ZeRO-1.

Weights and gradients lie in flat buffers, in reverse order of the model, so that a bucket is complete early in the
backward pass; experts that are cut over ranks have buckets of their own, since other ranks share them. With d ranks on
the shard axis each has 1/d of the masters and of the optimizer's state: gradients are reduce-scattered, updated weights
gathered (arXiv:1910.02054). With one, gradients are summed over all replicas.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mt_core.config.sections import ParallelConfig
from mt_core.contracts import Model, as_module
from mt_core.distributed.mesh import Axis, Mesh
from mt_core.parallel.tensor.plan import Placement

ALIGNMENT = 128
"""Elements to whose multiples parameters and buckets are padded."""


@dataclass(frozen=True, slots=True)
class Span:
    """Where a parameter lies: elements of a bucket."""

    bucket: int
    start: int
    length: int


@dataclass(slots=True)
class Bucket:
    """Flat buffers and what is under way on them."""

    weights: Tensor
    gradients: Tensor
    own: slice
    """This rank's part."""
    master: Tensor
    """Of the own part, in fp32 or wider; the weights themselves where those are wide enough."""
    names: frozenset[str]
    shard: Axis
    """Ranks that have the other parts."""
    replica: Axis
    """Ranks that have the same part."""
    waiting: set[str] = field(default_factory=set)
    """Parameters whose gradients are not complete yet."""
    reducing: dist.Work | None = None
    reduced: bool = False
    gathering: dist.Work | None = None


class Buckets:
    """`DataParallel` over flat buckets; frozen parameters lie outside them, whole on every data-parallel rank."""

    def __init__(
        self,
        model: Model,
        placements: Mapping[str, Placement],
        mesh: Mesh,
        *,
        device: torch.device,
        dtype: torch.dtype,
        gradients: torch.dtype,
        config: ParallelConfig,
    ) -> None:
        self.mesh, self.device, self.dtype, self.config = mesh, device, dtype, config
        self.placements: Mapping[str, Placement] = placements
        module = as_module(model)
        parameters = dict(model.named_parameters())
        self.shapes: Mapping[str, torch.Size] = {name: p.shape for name, p in parameters.items()}
        trainable = {name: p.numel() for name, p in parameters.items() if p.requires_grad}
        shared = {name: mesh.sharing(placements[name].axis) for name in trainable}
        self.spans = lay_out(trainable, config.bucket_size, shared)
        self.buckets = [*self._allocate(device, dtype, gradients)]
        self.masters: Mapping[str, nn.Parameter] = {name: nn.Parameter(part) for name, part in self._own_parts()}
        self.frozen: Mapping[str, Tensor] = {
            name: torch.zeros(shape, dtype=dtype, device=device)
            for name, shape in self.shapes.items()
            if name not in trainable
        }
        weights = {name: nn.Parameter(self._of(name, "weights")) for name in trainable}
        weights |= {name: nn.Parameter(weight, requires_grad=False) for name, weight in self.frozen.items()}
        _replace(module, {id(parameters[name]): weight for name, weight in weights.items()})
        for name in trainable:
            weights[name].register_post_accumulate_grad_hook(partial(self._accumulate, name))
        self._fresh: set[str] = set()
        self._last = False
        self._set, self._add = set_, add_
        if config.overlap_param_gather and any(bucket.shard.size > 1 for bucket in self.buckets):
            self._wait_in_forward(module)

    def _allocate(self, device: torch.device, dtype: torch.dtype, gradients: torch.dtype) -> Iterator[Bucket]:
        wide = torch.promote_types(dtype, torch.float32)
        for number in range(1 + max(span.bucket for span in self.spans.values())):
            spans = {name: span for name, span in self.spans.items() if span.bucket == number}
            shard, replica = self.mesh.sharing(self.placements[next(iter(spans))].axis)
            unit = math.lcm(ALIGNMENT, shard.size)
            length = max(-(-(span.start + span.length) // unit) * unit for span in spans.values())
            part = length // shard.size
            own = slice(part * shard.rank, part * (shard.rank + 1))
            weights = torch.zeros(length, dtype=dtype, device=device)
            master = weights[own] if wide == dtype else torch.zeros(part, dtype=wide, device=device)
            sums = weights.new_zeros(length, dtype=gradients)
            yield Bucket(weights, sums, own, master, frozenset(spans), shard, replica)

    def _own_parts(self) -> Iterator[tuple[str, Tensor]]:
        for name in (name for name in self.shapes if name in self.spans):
            bucket = self.buckets[self.spans[name].bucket]
            start, stop = self._range(name, bucket.shard.rank)
            if start < stop:
                offset = self.spans[name].start + start - bucket.own.start
                part = bucket.master[offset : offset + stop - start]
                yield name, part.view(self.shapes[name]) if stop - start == self.spans[name].length else part

    def _range(self, name: str, rank: int) -> tuple[int, int]:
        """First and last + 1 of a parameter's elements that lie in a shard rank's part."""
        span = self.spans[name]
        bucket = self.buckets[span.bucket]
        part = bucket.weights.numel() // bucket.shard.size
        start, stop = (min(max(edge - span.start, 0), span.length) for edge in (part * rank, part * (rank + 1)))
        return start, stop

    def _of(self, name: str, buffer: str) -> Tensor:
        span = self.spans[name]
        flat: Tensor = getattr(self.buckets[span.bucket], buffer)
        return flat[span.start : span.start + span.length].view(self.shapes[name])

    def shard_axis(self, name: str) -> Axis:
        """Only masters are shared; a frozen parameter is whole on each of the ranks."""
        return self.buckets[self.spans[name].bucket].shard if name in self.spans else Axis("shard")

    def view(self, name: str, whole: Tensor, rank: int) -> Tensor:
        """A flat range, or the whole in its shape."""
        if name in self.frozen:
            return whole
        start, stop = self._range(name, rank)
        return whole if stop - start == self.spans[name].length else whole.flatten()[start:stop]

    def split(self, name: str, part: Tensor) -> tuple[Tensor, Tensor]:
        """At the first element that other ranks hold as well."""
        place, flat = self.placements[name], part.flatten()
        if place.replicas.size == 1:
            return flat, flat[:0]
        start, _ = self._range(name, self.buckets[self.spans[name].bucket].shard.rank)
        edge = min(max(place.replicated_from - start, 0), flat.numel())
        return flat[:edge], flat[edge:]

    def compile(self) -> None:
        """Adding 16-bit gradients to wider sums, torch's own kernels reach half of the memory's rate."""
        self._set, self._add = torch.compile(set_, dynamic=True), torch.compile(add_, dynamic=True)

    def begin_step(self) -> None:
        """Every gradient is overwritten by the first backward pass."""
        self._fresh, self._last = set(self.spans), False
        for bucket in self.buckets:
            bucket.waiting, bucket.reduced = set(bucket.names), False

    def last_backward(self) -> None:
        """From now on complete buckets are reduced."""
        self._last = True

    def _accumulate(self, name: str, weight: Tensor) -> None:
        assert weight.grad is not None
        gradient = self._of(name, "gradients")
        if name in self._fresh:
            self._set(gradient.view(-1), weight.grad.flatten())
            self._fresh.discard(name)
        else:
            self._add(gradient.view(-1), weight.grad.flatten())
        weight.grad = None
        if self._last and self.config.overlap_grad_reduce:
            bucket = self.buckets[self.spans[name].bucket]
            bucket.waiting.discard(name)
            if not bucket.waiting:
                self._start_reduction(bucket)

    def _start_reduction(self, bucket: Bucket) -> None:
        bucket.reduced = True
        if (axis := bucket.shard).size > 1:
            part = bucket.gradients[bucket.own]
            bucket.reducing = dist.reduce_scatter_tensor(part, bucket.gradients, group=axis.group, async_op=True)
        elif (axis := bucket.replica).size > 1:
            bucket.reducing = dist.all_reduce(bucket.gradients, group=axis.group, async_op=True)

    @torch.no_grad()
    def reduce(self) -> None:
        """Waits for the reductions under way and does those that are left."""
        assert not self._fresh, f"no gradient reached {sorted(self._fresh)}"
        for bucket in self.buckets:
            if not bucket.reduced:
                self._start_reduction(bucket)
        for bucket in self.buckets:
            _finish(bucket, "reducing")
            if bucket.shard.size > 1:
                bucket.replica.sum_(bucket.gradients[bucket.own])
        for name, master in self.masters.items():
            part = self.view(name, self._of(name, "gradients"), self.buckets[self.spans[name].bucket].shard.rank)
            master.grad = part.to(master.dtype)

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters, then gather the parts of all shard ranks, the model's first weights first."""
        self.wait()  # a second gathering of the same buffers must not meet the first
        for master in self.masters.values():
            master.grad = None
        for bucket in reversed(self.buckets):
            part = bucket.weights[bucket.own]
            if part.data_ptr() != bucket.master.data_ptr():
                part.copy_(bucket.master)
            if (axis := bucket.shard).size > 1:
                bucket.gathering = dist.all_gather_into_tensor(bucket.weights, part, group=axis.group, async_op=True)
        if not self.config.overlap_param_gather:
            self.wait()

    def wait(self) -> None:
        """Wait for every bucket's gathering."""
        for bucket in self.buckets:
            _finish(bucket, "gathering")

    def _wait_in_forward(self, model: nn.Module) -> None:
        """Each unit waits, before it runs, for the buckets of its weights; one without weights for all."""
        for prefix, unit in units(model):
            numbers = {span.bucket for name, span in self.spans.items() if name.startswith(f"{prefix}.")}
            has_weights = any(name.startswith(f"{prefix}.") for name in self.shapes)
            waited = [self.buckets[number] for number in sorted(numbers)] if has_weights else self.buckets
            unit.register_forward_pre_hook(partial(_finish_all, waited))


def lay_out(sizes: Mapping[str, int], bucket_size: int, shared: Mapping[str, object] | None = None) -> dict[str, Span]:
    """Spans of parameters in reverse order; a bucket is closed when it has `bucket_size` elements.

    Parameters lie in one bucket only if `shared` has equal values for them, those with whom they are shared.
    """
    spans, ends, count = {}, {}, 0
    for name, size in reversed(list(sizes.items())):
        sharers = shared and shared[name]
        bucket, start = ends.get(sharers, (0, bucket_size))
        if start >= bucket_size:
            bucket, start, count = count, 0, count + 1
        spans[name] = Span(bucket, start, size)
        ends[sharers] = bucket, start + -(-size // ALIGNMENT) * ALIGNMENT
    return spans


def set_(sums: Tensor, gradient: Tensor) -> None:
    """The first gradient of a step."""
    sums.copy_(gradient)


def add_(sums: Tensor, gradient: Tensor) -> None:
    """A further one."""
    sums.add_(gradient)


def units(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a model that run one after the other: its children, and the members of its lists of layers."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleDict | nn.ModuleList):
            yield from ((f"{name}.{key}", member) for key, member in child.named_children())
        else:
            yield name, child


def _replace(model: nn.Module, parameters: Mapping[int, nn.Parameter]) -> None:
    for module in model.modules():
        for leaf, old in module.named_parameters(recurse=False):
            module.register_parameter(leaf, parameters[id(old)])


def _finish_all(buckets: Iterable[Bucket], *_: Any) -> None:
    for bucket in buckets:
        _finish(bucket, "gathering")


def _finish(bucket: Bucket, work: str) -> None:
    if (pending := getattr(bucket, work)) is not None:
        pending.wait()
        setattr(bucket, work, None)
