"""A row's result is the same to the last bit, whatever other rows there are, and wherever it stands."""

import pytest
import torch
import torch.nn.functional as F

from mt_eval.generation import batch_invariance
from mt_eval.generation.batch_invariance import BatchInvariance, agrees_in_tiles

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def cuts(rows):
    return [(0, 1), (4, 5), (3, 10), (1, rows), (rows - 1, rows), (0, 9), (2, 42)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inputs", [17, 24, 64])
def test_products_do_not_depend_on_other_rows(inputs, dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=generator).to(dtype) for s in ((170, inputs), (33, inputs), (33,)))
    with BatchInvariance():
        for offset in (None, bias):
            whole = F.linear(x, weight, offset)
            assert all(torch.equal(F.linear(x[a:b], weight, offset), whole[a:b]) for a, b in cuts(170))
    torch.testing.assert_close(whole, F.linear(x, weight, bias))


def test_several_threads_change_nothing():
    torch.set_num_threads(2)
    x, weight = (torch.randn(rows, 300, generator=torch.Generator().manual_seed(0)) for rows in (170, 500))
    with BatchInvariance():
        whole = F.linear(x, weight)
        assert all(torch.equal(F.linear(x[a:b], weight), whole[a:b]) for a, b in cuts(170))
        assert torch.equal(F.gelu(x)[2:42], F.gelu(x[2:42]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [F.silu, F.gelu, torch.tanh, torch.sigmoid, torch.exp, torch.Tensor.cos])
def test_activations_do_not_depend_on_other_rows(function, dtype):
    x = torch.randn(1000, 37, generator=torch.Generator().manual_seed(0)).to(dtype)
    with BatchInvariance():
        whole = function(x)
        assert all(torch.equal(function(x[a:b]), whole[a:b]) for a, b in cuts(1000))
        assert torch.equal(function(x.mT).mT, whole)
    torch.testing.assert_close(whole, function(x))


def test_a_product_whose_tiles_do_not_agree_is_made_row_by_row(monkeypatch):
    """Rows of 17 numbers begin at addresses of which only some suit vectors; other processors may differ elsewhere."""
    monkeypatch.setattr(batch_invariance, "agrees_in_tiles", lambda weight, bias: False)
    x, weight = torch.randn(5, 8), torch.randn(3, 8)
    with BatchInvariance():
        y = F.linear(x, weight)
    assert torch.equal(y, torch.cat([F.linear(row[None], weight) for row in x]))
    assert agrees_in_tiles(weight, None)


def test_disagreement_of_tiles_is_noticed(monkeypatch):
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: linear(x, *rest) + (len(x) == 8))
    assert not agrees_in_tiles(torch.randn(3, 8), None)
