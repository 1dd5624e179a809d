"""Gradients of weights, apart from those of inputs: other stages need not wait for them (arXiv:2401.10241).

A linear layer whose `op` is a `SplitLinear` computes in the backward pass what the stage before needs, and keeps what
the weight's gradient is made of until the schedule asks for it. Other weights, such as those of norms, embeddings,
experts and the output layer, get their gradients along with the inputs; so do all where blocks are compiled or FSDP2
has the weights, which frees them after the pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mt_core.parallel.tensor.linear import ColumnLinear, RowLinear, column_gradients, row_gradients

LinearOp = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Postponed = tuple[Tensor, Callable[[], Tensor]]
"""A weight and the function that computes its gradient."""
Key = tuple[int, int]
"""Micro-batch and chunk."""


@dataclass(slots=True)
class WeightGradients:
    """Gradients of weights that are still to be computed."""

    postponed: dict[Key, list[Postponed]] = field(default_factory=dict)
    current: Key | None = None
    """Whose gradients are postponed now; None if they are computed at once."""

    @contextmanager
    def postpone(self, key: Key) -> Iterator[None]:
        """In the block, backward passes leave out the gradients of weights."""
        self.current, self.postponed[key] = key, []
        try:
            yield
        finally:
            self.current = None

    def add(self, weight: Tensor, compute: Callable[[], Tensor]) -> bool:
        """Postpone a gradient; False if it has to be computed at once."""
        if self.current is None:
            return False
        self.postponed[self.current].append((weight, compute))
        return True

    def compute(self, key: Key) -> None:
        """Compute and accumulate what was left out."""
        for weight, compute in self.postponed.pop(key):
            torch.autograd.backward([weight], [compute()])


@dataclass(frozen=True, slots=True)
class SplitLinear:
    """A linear layer's `op` whose weight gradient can wait."""

    op: LinearOp
    """`torch.nn.functional.linear`, or its implementation over an axis."""
    postponed: WeightGradients

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What `op` returns."""
        return _SplitLinear.apply(x, weight, bias, self)  # pyright: ignore[reportReturnType]

    def compute_gradients(
        self, g: Tensor, x: Tensor | None, weight: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of x, if the weight is given, and of the weight, if x is."""
        match self.op:
            case ColumnLinear(axis, sequence) if axis.size > 1:
                return column_gradients(g, x, weight, axis, sequence)
            case RowLinear(axis, sequence) if axis.size > 1:
                return row_gradients(g, x, weight, axis, sequence)
        g_x = None if weight is None else g @ weight
        return g_x, None if x is None else g.flatten(0, -2).mT @ x.flatten(0, -2)


class _Context(Protocol):
    """What a pass forward leaves for the one back."""

    weight: Tensor
    split: SplitLinear

    def save_for_backward(self, *tensors: Tensor) -> None: ...

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...

    @property
    def needs_input_grad(self) -> tuple[bool, ...]: ...


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, weight: Tensor, bias: Tensor | None, split: SplitLinear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.split = weight, split  # the weight itself: recomputation would give one without a graph
        return split.op(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (g,), (x,), weight, split = gradients, ctx.saved_tensors, ctx.weight, ctx.split
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        g_x = split.compute_gradients(g, None, weight.detach())[0] if needs_x else None

        def compute() -> Tensor:
            g_weight = split.compute_gradients(g, x, None)[1]
            assert g_weight is not None
            return g_weight

        postponed = needs_weight and split.postponed.add(weight, compute)
        g_weight = compute() if needs_weight and not postponed else None
        return g_x, g_weight, g.flatten(0, -2).sum(0) if needs_bias else None, None


def split_weight_gradients(model: nn.Module, postponed: WeightGradients) -> None:
    """Let the linear layers of a model postpone the gradients of their weights."""
    for module in model.modules():
        op: Any = getattr(module, "op", None)
        if op is F.linear or isinstance(op, ColumnLinear | RowLinear):
            split: Any = SplitLinear(op, postponed)
            module.op = split
