"""Products that are gradients of weights, added to a step's sums by the layers themselves, at once or later.

Autograd would compute gᵀ · x in the weight's data type and let the gradient engine add it to the sum. A layer with a
`WeightSum` adds the product itself: on a GPU inside the matrix product, without a pass over memory, and in a pipeline
whenever the schedule asks for it, since other stages do not need it (arXiv:2401.10241).

Autograd sees an *anchor* in place of the weight: one element that requires a gradient, so that the backward pass is
kept and the engine is told when the weight's gradient is complete. Operators find a sum by its number, because a
compiled layer cannot pass one, nor a tensor that it changes and has saved.

Shape suffixes: M rows, R rows in the order of their experts, E experts, O outputs, I inputs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol, runtime_checkable
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

Key = tuple[int, int]
"""Micro-batch and chunk."""


@runtime_checkable
class GradientSums(Protocol):
    """A gradient engine whose sums of a step layers can add to."""

    def open_sum(self, name: str) -> tuple[Tensor, bool]:
        """Return the sum of a parameter's gradients, shaped like it, for the caller to add to or, if this is the
        step's first gradient, to overwrite."""
        ...

    def add_to(self, total: Tensor, gradient: Tensor, *, overwrite: bool = False) -> None:
        """Add a gradient, of as many elements, to a sum, or overwrite it."""
        ...

    def finish_gradient(self, name: str) -> None:
        """A backward pass has added all of a parameter's gradient: after the step's last one it may be reduced."""
        ...


@dataclass(slots=True)
class PostponedProducts:
    """Gradients of weights that are still to be computed, for each pass of a pipeline."""

    waiting: dict[Key, list[tuple["WeightSum", Callable[[], object]]]] = field(default_factory=dict)
    current: Key | None = None
    """Whose products are postponed now; None if they are computed at once."""

    @contextmanager
    def postpone(self, key: Key) -> Iterator[None]:
        """In the block, backward passes leave out the gradients of weights."""
        self.current, self.waiting[key] = key, []
        try:
            yield
        finally:
            self.current = None

    @torch.no_grad()
    def compute(self, key: Key) -> None:
        """Compute and add what was left out."""
        for total, product in self.waiting.pop(key):
            product()
            total.finish()


Choice = Callable[[Tensor, Tensor, Tensor, Callable[[Tensor], None]], bool]
"""Whether products of such factors are added inside the matrix product: given a sum to try it on, the factors, and the
function that adds a product otherwise."""


class WeightSum:
    """The sum of one weight's gradients, to which products are added: inside the matrix product, or rounded to the
    weight's data type first."""

    def __init__(
        self, name: str, weight: Tensor, sums: GradientSums, postponed: PostponedProducts, choose: Choice
    ) -> None:
        self.name, self.sums, self.postponed, self.choose = name, sums, postponed, choose
        self.fused: bool | None = None
        """None until the first product."""
        self.number = torch.tensor(next(_NUMBERS))
        """What operators find the sum by: a tensor on the CPU, since compiled code would be made again for each int."""
        self.anchor = torch.zeros(1, dtype=weight.dtype, device=weight.device, requires_grad=True)
        self.anchor.register_post_accumulate_grad_hook(self._end_pass)
        _SUMS[int(self.number)] = self

    def add(self, g_MO: Tensor, x_MI: Tensor) -> None:
        """Add g_MOᵀ · x_MI."""
        total, overwrite = self.sums.open_sum(self.name)
        total_OI = total.view(g_MO.shape[1], x_MI.shape[1])
        if self.fused is None:
            self.fused = self.choose(total_OI, g_MO, x_MI, lambda product: self.sums.add_to(total, product))
        if self.fused:
            multiply_into(total_OI, g_MO, x_MI, overwrite=overwrite)
        else:
            self.sums.add_to(total, g_MO.mT @ x_MI, overwrite=overwrite)

    def add_grouped(self, g_RO: Tensor, x_RI: Tensor, counts_E: Tensor, rows: Sequence[int] | None) -> None:
        """Add the product of each expert's rows to the sum of its weight; no rows add zeros. Without their numbers on
        the host a GPU makes all products in one kernel, rounded."""
        total, overwrite = self.sums.open_sum(self.name)
        if rows is None and g_RO.is_cuda:
            product_EOI = F.grouped_mm(g_RO.mT, x_RI, offs=counts_E.cumsum(0).to(torch.int32))
            return self.sums.add_to(total, product_EOI, overwrite=overwrite)
        sizes = counts_E.tolist() if rows is None else [*rows]
        total_EOI = total.view(len(sizes), g_RO.shape[1], x_RI.shape[1])
        for total_OI, g_MO, x_MI in zip(total_EOI, g_RO.split(sizes), x_RI.split(sizes), strict=True):
            multiply_into(total_OI, g_MO, x_MI, overwrite=overwrite)
        return None

    def postpone(self, product: Callable[[], object]) -> bool:
        """Keep a function that adds a product for later; False if it is to be called at once."""
        if self.postponed.current is None:
            return False
        self.postponed.waiting[self.postponed.current].append((self, product))
        return True

    def finish(self) -> None:
        """Tell the engine that a pass has added its products."""
        self.sums.finish_gradient(self.name)

    def _end_pass(self, anchor: Tensor) -> None:
        anchor.grad = None
        if self.postponed.current is None:
            self.finish()


_NUMBERS = count()
_SUMS: WeakValueDictionary[int, WeightSum] = WeakValueDictionary()


def find_sum(number: Tensor) -> WeightSum:
    """Return the sum with this number."""
    return _SUMS[int(number)]


def multiply_into(total_OI: Tensor, g_MO: Tensor, x_MI: Tensor, *, overwrite: bool) -> None:
    """Add g_MOᵀ · x_MI to a sum, or overwrite it, without rounding to the factors' data type.

    A CPU multiplies into a wider type by converting the factors.
    """
    if total_OI.dtype == g_MO.dtype or not g_MO.is_cuda:
        g_MO, x_MI = g_MO.to(total_OI.dtype), x_MI.to(total_OI.dtype)
        if overwrite:
            torch.mm(g_MO.mT, x_MI, out=total_OI)
        else:
            total_OI.addmm_(g_MO.mT, x_MI)
    elif overwrite:
        torch.mm(g_MO.mT, x_MI, out_dtype=total_OI.dtype, out=total_OI)
    else:
        torch.addmm(total_OI, g_MO.mT, x_MI, out_dtype=total_OI.dtype, out=total_OI)


@torch.library.custom_op("mt::add_weight_gradient", mutates_args=())
def add_weight_gradient(number: Tensor, g: Tensor, x: Tensor) -> Tensor:
    """Add the product of g […, O] and x […, I] over their rows to a sum, now or later; return the anchor's gradient."""
    total = find_sum(number)

    def add() -> None:
        total.add(g.flatten(0, -2), x.flatten(0, -2))

    if not total.postpone(add):
        add()
    return g.new_zeros(1)


@add_weight_gradient.register_fake
def _(number: Tensor, g: Tensor, x: Tensor) -> Tensor:
    return g.new_empty(1)


@torch.library.custom_op("mt::add_expert_gradients", mutates_args=())
def add_expert_gradients(
    number: Tensor, g: Tensor, x: Tensor, counts: Tensor, rows: Sequence[int] | None = None
) -> Tensor:
    """Add the product of each expert's rows of g [R, O] and x [R, I] to a sum [E, O, I], now or later; return the
    anchor's gradient."""
    total, sizes = find_sum(number), None if rows is None else [*rows]

    def add() -> None:
        total.add_grouped(g, x, counts, sizes)

    if not total.postpone(add):
        add()
    return g.new_zeros(1)


@add_expert_gradients.register_fake
def _(number: Tensor, g: Tensor, x: Tensor, counts: Tensor, rows: Sequence[int] | None = None) -> Tensor:
    return g.new_empty(1)
