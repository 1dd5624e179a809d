"""Replicated weights with flat buckets of gradients: plain data parallelism and, with a shard axis, ZeRO-1.

Weights and gradients lie in flat buffers, in reverse order of the model, so that a bucket is complete early in the
backward pass; experts that are cut over ranks have buckets of their own, since other ranks share them. With d ranks on
the shard axis each has 1/d of the main parameters and of the optimizer's state: gradients are reduce-scattered, updated
weights gathered (arXiv:1910.02054). With one, gradients are summed over all replicas.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mt_core.config.sections import ParallelConfig
from mt_core.contracts import Model, as_module
from mt_core.distributed.mesh import Axis, Mesh
from mt_core.parallel.tensor.placement import Placement

ALIGNMENT = 128
"""Elements to whose multiples parameters and buckets are padded."""


@dataclass(frozen=True, slots=True)
class Span:
    """Elements of a bucket that belong to one parameter."""

    bucket: int
    start: int
    length: int


@dataclass(slots=True)
class Bucket:
    """Flat buffers of some parameters, and the collectives under way on them."""

    weights: Tensor
    gradients: Tensor
    local: slice
    """This rank's shard of the buffers."""
    main_params: Tensor
    """The main parameters of this rank's shard, in fp32 or wider: the weights themselves if those are wide enough."""
    names: frozenset[str]
    shard: Axis
    """Ranks that have the other shards."""
    replica: Axis
    """Ranks that have the same shard."""
    waiting: set[str] = field(default_factory=set)
    """Parameters whose gradients are not complete yet."""
    reducing: dist.Work | None = None
    reduced: bool = False
    gathering: dist.Work | None = None


class Buckets:
    """Data parallelism over flat buckets; frozen parameters are outside them, whole on every data-parallel rank."""

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
        axes = {name: (mesh.shard_axes(placements[name].axis), placements[name].tied) for name in trainable}
        self.spans = lay_out(trainable, config.bucket_size, axes)
        self.buckets = [*self._allocate(device, dtype, gradients)]
        self.main_params: Mapping[str, nn.Parameter] = {
            name: nn.Parameter(shard) for name, shard, _ in self._list_local_shards()
        }
        self.rounded_params: Mapping[Tensor, Tensor] = {
            self.main_params[name]: rounded
            for name, shard, rounded in self._list_local_shards()
            if rounded.dtype != shard.dtype
        }
        self.frozen: Mapping[str, Tensor] = {
            name: torch.zeros(shape, dtype=dtype, device=device)
            for name, shape in self.shapes.items()
            if name not in trainable
        }
        weights = {name: nn.Parameter(self._view_buffer(name, "weights")) for name in trainable}
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
        for number in range(1 + max((span.bucket for span in self.spans.values()), default=-1)):
            spans = {name: span for name, span in self.spans.items() if span.bucket == number}
            shard, replica = self.mesh.shard_axes(self.placements[next(iter(spans))].axis)
            unit = math.lcm(ALIGNMENT, shard.size)
            length = max(-(-(span.start + span.length) // unit) * unit for span in spans.values())
            shard_length = length // shard.size
            local = slice(shard_length * shard.rank, shard_length * (shard.rank + 1))
            weights = torch.zeros(length, dtype=dtype, device=device)
            main_params = weights[local] if wide == dtype else torch.zeros(shard_length, dtype=wide, device=device)
            sums = weights.new_zeros(length, dtype=gradients)
            yield Bucket(weights, sums, local, main_params, frozenset(spans), shard, replica)

    def _list_local_shards(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """List this rank's part of each parameter: the main one, in its shape where it is whole, and the weights'."""
        for name in (name for name in self.shapes if name in self.spans):
            bucket = self.buckets[self.spans[name].bucket]
            start, stop = self._range(name, bucket.shard.rank)
            if start < stop:
                offset = self.spans[name].start + start - bucket.local.start
                part = slice(offset, offset + stop - start)
                flat, rounded = bucket.main_params[part], bucket.weights[bucket.local][part]
                whole = stop - start == self.spans[name].length
                yield name, flat.view(self.shapes[name]) if whole else flat, rounded

    def _range(self, name: str, rank: int) -> tuple[int, int]:
        """Return the first and last + 1 of a parameter's elements that are in a shard rank's part."""
        span = self.spans[name]
        bucket = self.buckets[span.bucket]
        length = bucket.weights.numel() // bucket.shard.size
        start, stop = (min(max(edge - span.start, 0), span.length) for edge in (length * rank, length * (rank + 1)))
        return start, stop

    def _view_buffer(self, name: str, buffer: str) -> Tensor:
        span = self.spans[name]
        flat: Tensor = getattr(self.buckets[span.bucket], buffer)
        return flat[span.start : span.start + span.length].view(self.shapes[name])

    def shard_axis(self, name: str) -> Axis:
        """Return the shard axis of a trained parameter; a frozen one is whole on every rank, an axis of size 1."""
        return self.buckets[self.spans[name].bucket].shard if name in self.spans else Axis("shard")

    def local_shard(self, name: str, whole: Tensor, rank: int) -> Tensor:
        """Return a flat range of the tensor, or all of it in its shape."""
        if name in self.frozen:
            return whole
        start, stop = self._range(name, rank)
        return whole if stop - start == self.spans[name].length else whole.flatten()[start:stop]

    def split_replicated(self, name: str, shard: Tensor) -> tuple[Tensor, Tensor]:
        """Split, flat, at the first element that other tensor ranks hold as well."""
        placement, flat = self.placements[name], shard.flatten()
        if placement.replicas.size == 1:
            return flat, flat[:0]
        start, _ = self._range(name, self.buckets[self.spans[name].bucket].shard.rank)
        edge = min(max(placement.replicated_from - start, 0), flat.numel())
        return flat[:edge], flat[edge:]

    def compile(self) -> None:
        """Compile gradient accumulation: eager bf16→fp32 `add_` reaches half of the memory bandwidth."""
        self._set, self._add = torch.compile(set_, dynamic=True), torch.compile(add_, dynamic=True)

    def begin_step(self) -> None:
        """Let the first backward pass overwrite every gradient."""
        self._fresh, self._last = set(self.spans), False
        for bucket in self.buckets:
            bucket.waiting, bucket.reduced = set(bucket.names), False

    def last_backward(self) -> None:
        """Reduce buckets from now on as soon as they are complete."""
        self._last = True

    def complete(self, names: Collection[str]) -> None:
        """Reduce the buckets in which all gradients are complete now."""
        for bucket in self.buckets if self.config.overlap_grad_reduce else []:
            bucket.waiting -= {*names}
            if not bucket.waiting and not bucket.reduced:
                self._start_reduction(bucket)

    def _accumulate(self, name: str, weight: Tensor) -> None:
        if weight.grad is None:
            return  # of a compiled layer, which adds the gradient itself
        total, overwrite = self.open_sum(name)
        self.add_to(total, weight.grad, overwrite=overwrite)
        weight.grad = None
        self.finish_gradient(name)

    def open_sum(self, name: str) -> tuple[Tensor, bool]:
        """Return the sum of a parameter's gradients, shaped like it, and whether the caller is to overwrite it."""
        overwrite = name in self._fresh
        self._fresh.discard(name)
        return self._view_buffer(name, "gradients"), overwrite

    def add_to(self, total: Tensor, gradient: Tensor, *, overwrite: bool = False) -> None:
        """Add a gradient, of as many elements, to a sum, or overwrite it."""
        (self._set if overwrite else self._add)(total.view(-1), gradient.flatten())

    def finish_gradient(self, name: str) -> None:
        """In the step's last backward pass, reduce the parameter's bucket if it is complete now."""
        if self._last and self.config.overlap_grad_reduce:
            bucket = self.buckets[self.spans[name].bucket]
            bucket.waiting.discard(name)
            if not bucket.waiting and not bucket.reduced:
                self._start_reduction(bucket)

    def _start_reduction(self, bucket: Bucket) -> None:
        bucket.reduced = True
        if (axis := bucket.shard).size > 1:
            part = bucket.gradients[bucket.local]
            bucket.reducing = dist.reduce_scatter_tensor(part, bucket.gradients, group=axis.group, async_op=True)
        elif (axis := bucket.replica).size > 1:
            bucket.reducing = dist.all_reduce(bucket.gradients, group=axis.group, async_op=True)

    @torch.no_grad()
    def reduce(self) -> None:
        """Wait for the reductions under way and do those that are left."""
        assert not self._fresh, f"no gradient reached {sorted(self._fresh)}"
        for bucket in self.buckets:
            if not bucket.reduced:
                self._start_reduction(bucket)
        for bucket in self.buckets:
            _finish(bucket, "reducing")
            if bucket.shard.size > 1:
                bucket.replica.sum_(bucket.gradients[bucket.local])
        for name, main_param in self.main_params.items():
            shard_rank = self.buckets[self.spans[name].bucket].shard.rank
            gradient = self.local_shard(name, self._view_buffer(name, "gradients"), shard_rank)
            main_param.grad = gradient.to(main_param.dtype)

    @torch.no_grad()
    def all_gather_params(self, *, rounded: bool = False) -> None:
        """Round the main parameters, then gather the parts of all shard ranks, the model's first weights first."""
        self.wait()  # the previous all-gather into these buffers must have completed
        for main_param in self.main_params.values():
            main_param.grad = None
        for bucket in reversed(self.buckets):
            part = bucket.weights[bucket.local]
            if part.data_ptr() != bucket.main_params.data_ptr() and not rounded:
                part.copy_(bucket.main_params)
            if (axis := bucket.shard).size > 1:
                bucket.gathering = dist.all_gather_into_tensor(bucket.weights, part, group=axis.group, async_op=True)
        if not self.config.overlap_param_gather:
            self.wait()

    def wait(self) -> None:
        """Wait for every bucket's all-gather."""
        for bucket in self.buckets:
            _finish(bucket, "gathering")

    def _wait_in_forward(self, model: nn.Module) -> None:
        """Make each unit wait, before it runs, for the buckets of its weights; one without weights for all."""
        for prefix, unit in list_units(model):
            numbers = {span.bucket for name, span in self.spans.items() if name.startswith(f"{prefix}.")}
            has_weights = any(name.startswith(f"{prefix}.") for name in self.shapes)
            waited = [self.buckets[number] for number in sorted(numbers)] if has_weights else self.buckets
            unit.register_forward_pre_hook(partial(_finish_all, waited))


def lay_out(sizes: Mapping[str, int], bucket_size: int, axes: Mapping[str, object] | None = None) -> dict[str, Span]:
    """Assign parameters to spans in reverse order; a bucket is closed when it has `bucket_size` elements.

    Parameters share a bucket only if `axes` has equal values for them: the axes over which they are sharded, and those
    of stages that have them too, whose buckets then are alike.
    """
    spans, ends, count = {}, {}, 0
    for name, size in reversed(list(sizes.items())):
        key = axes and axes[name]
        bucket, start = ends.get(key, (0, bucket_size))
        if start >= bucket_size:
            bucket, start, count = count, 0, count + 1
        spans[name] = Span(bucket, start, size)
        ends[key] = bucket, start + -(-size // ALIGNMENT) * ALIGNMENT
    return spans


def set_(sums: Tensor, gradient: Tensor) -> None:
    """Overwrite the sums with the first gradient of a step."""
    sums.copy_(gradient)


def add_(sums: Tensor, gradient: Tensor) -> None:
    """Add a further gradient of a step."""
    sums.add_(gradient)


def list_units(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """List the parts of a model that run one after the other: its children, and the members of its lists of layers."""
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
