"""Each differentiable collective is the transpose of its backward pass, and cut layers compute what whole ones do."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mt_core.distributed.mesh import Axis
from mt_core.parallel.tensor import collectives
from mt_core.parallel.tensor.cross_entropy import VocabCrossEntropy, linear_cross_entropy
from mt_core.parallel.tensor.linear import VocabLinear
from mt_core.verification.ranks import run_ranks

B, T, D = 2, 8, 4


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inner_products(axis: Axis, name: str, dim: int | None) -> tuple[float, float]:
    """⟨y, A x⟩ and ⟨Aᵀ y, x⟩, each summed over the ranks."""
    x = drawn(B, T, D, seed=axis.rank).requires_grad_()
    dims = () if dim is None else (dim,)
    out = getattr(collectives, name)(x, axis, *dims)
    y = drawn(*out.shape, seed=10 + axis.rank)
    (out * y).sum().backward()
    sums = axis.sum_(torch.stack([(out.detach() * y).sum(), (x.grad * x.detach()).sum()]))
    return float(sums[0]), float(sums[1])


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("name", ["all_gather", "reduce_scatter"])
def test_all_gather_and_reduce_scatter_are_transposes(name, dim):
    for forward, backward in run_ranks(2, inner_products, name, dim):
        assert forward == pytest.approx(backward, rel=1e-12)


def round_trip(axis: Axis, dim: int) -> bool:
    x = drawn(B, T, D)
    return torch.equal(
        collectives.gather_from_tensor_parallel(collectives.scatter_to_tensor_parallel(x, axis, dim), axis, dim), x
    )


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_scattering_and_gathering_give_the_tensor_back(dim):
    assert run_ranks(2, round_trip, dim) == [True, True]


def gradients(axis: Axis, name: str) -> list[float]:
    x = torch.full((2,), 1.0 + axis.rank, requires_grad=True)
    y = getattr(collectives, name)(x, axis)
    (y * (axis.rank + 1)).sum().backward()
    return [float(y[0]), float(x.grad[0])]


def test_copy_sums_gradients_and_reduce_sums_values():
    assert run_ranks(2, gradients, "copy_to_tensor_parallel") == [[1.0, 3.0], [2.0, 3.0]]
    assert run_ranks(2, gradients, "reduce_from_tensor_parallel") == [[3.0, 1.0], [3.0, 2.0]]


def test_on_an_axis_of_one_rank_they_are_the_identity():
    x = drawn(B, T, D)
    for name in ("copy_to_tensor_parallel", "reduce_from_tensor_parallel"):
        assert getattr(collectives, name)(x, Axis("tensor")) is x
    for name in ("all_gather", "reduce_scatter", "scatter_to_tensor_parallel", "gather_from_tensor_parallel"):
        assert getattr(collectives, name)(x, Axis("tensor"), 1) is x


VOCAB, ROWS = 10, 16
"""Six rows are padding, all of the last of four ranks among them."""


def losses(axis: Axis, sequence: bool) -> list[Tensor]:
    x, weight = drawn(B, T, D), drawn(ROWS, D, seed=1) * 100
    labels = torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(2))
    x = (collectives.local_shard(x, axis, 1) if sequence else x).requires_grad_()
    rows = collectives.local_shard(weight, axis, 0).requires_grad_()
    loss = VocabCrossEntropy(axis, sequence)(x, rows, labels, VOCAB)
    loss.sum().backward()
    whole_x = collectives.all_gather_async(x.grad, axis, 1)() if sequence else x.grad
    logits = VocabLinear(axis, sequence)(x.detach(), rows.detach(), None)
    return [loss.detach(), whole_x, collectives.all_gather_async(rows.grad, axis, 0)(), logits]


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
def test_cross_entropy_over_a_cut_vocabulary_is_that_over_the_whole(ranks, sequence):
    x, weight = drawn(B, T, D).requires_grad_(), (drawn(ROWS, D, seed=1) * 100).requires_grad_()
    labels = torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(2))
    loss = linear_cross_entropy(x, weight, labels, VOCAB)
    loss.sum().backward()
    expected = [loss.detach(), x.grad, weight.grad, F.linear(x, weight).detach()]
    for values in run_ranks(ranks, losses, sequence):
        for a, b in zip(values, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * float(b.abs().max()))


def test_padding_rows_get_no_probability_however_large_their_logits():
    _, _, weight_gradient, logits = run_ranks(2, losses, False)[0]
    assert logits[..., VOCAB:].max() > 100
    assert weight_gradient[VOCAB:].abs().max() == 0
