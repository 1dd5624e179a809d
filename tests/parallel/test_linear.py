"""Linear layers cut over an axis compute the gradients that somebody needs, and no others."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from mt_core.distributed.mesh import Axis
from mt_core.parallel.tensor.linear import ColumnLinear, RowLinear
from mt_core.verification.ranks import run_ranks


class Backward(NamedTuple):
    products: int
    gradients: list[Tensor | None]
    """Gradients of x, the weight and the bias."""


def run_backward(axis: Axis, kind: type, sequence: bool, needed: tuple[bool, bool, bool]) -> Backward:
    generator = torch.Generator().manual_seed(axis.rank)
    shapes = ((2, 4, 6), (8, 6), (8,))
    x, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    for tensor, is_needed in zip((x, weight, bias), needed, strict=True):
        tensor.requires_grad_(is_needed)
    y = kind(axis, sequence)(x, weight, bias)
    with count_products() as products:
        (y * torch.arange(y.numel()).view(y.shape)).sum().backward()
    return Backward(len(products), [x.grad, weight.grad, bias.grad])


@contextmanager
def count_products() -> Iterator[list[tuple[int, ...]]]:
    """Collect the shapes of the results of matrix products, as `@` or as `torch.mm`."""
    shapes: list[tuple[int, ...]] = []

    def counted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*inputs: Any, **keywords: Any) -> Tensor:
            result = function(*inputs, **keywords)
            shapes.append(tuple(result.shape))
            return result

        return run

    with (
        patch.object(Tensor, "__matmul__", counted(Tensor.__matmul__)),
        patch.object(torch, "mm", counted(torch.mm)),
    ):
        yield shapes


NEEDED = [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
"""Whether x, the weight and the bias need a gradient."""


def run_all(axis: Axis, kind: type, sequence: bool) -> list[Backward]:
    return [run_backward(axis, kind, sequence, needed) for needed in NEEDED]


@pytest.mark.parametrize("sequence", [False, True], ids=["whole sequence", "sequence parallel"])
@pytest.mark.parametrize("kind", [ColumnLinear, RowLinear])
def test_gradients_that_nobody_needs_are_not_computed(kind, sequence):
    for everything, *backwards in run_ranks(2, run_all, kind, sequence):
        for number, backward in enumerate(backwards):
            others = [gradient for index, gradient in enumerate(backward.gradients) if index != number]
            assert others == [None, None]
            torch.testing.assert_close(backward.gradients[number], everything.gradients[number], rtol=0, atol=0)
        assert [backward.products for backward in backwards] == [everything.products - 1, 1, 0]


@pytest.mark.parametrize("kind", [ColumnLinear, RowLinear])
def test_a_frozen_weight_keeps_no_input_for_backward(kind):
    assert run_ranks(2, list_saved_shapes, kind, False) == [[(8, 6)], [(8, 6)]]
    assert run_ranks(2, list_saved_shapes, kind, True) == [[(2, 4, 6), (8, 6)]] * 2


def list_saved_shapes(axis: Axis, kind: type, trained: bool) -> list[tuple[int, ...]]:
    x = torch.ones(2, 4, 6, requires_grad=True)
    weight = torch.ones(8, 6, requires_grad=trained)
    saved: list[tuple[int, ...]] = []

    def record(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        kind(axis, False)(x, weight, None)
    return saved
