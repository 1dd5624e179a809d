"""A row's result is the same to the last bit, whatever other rows there are, and wherever it stands."""

import pytest
import torch
import torch.nn.functional as F

from eval.generation.families import make_family
from mt_eval.generation.exact import batch_invariance, packed_weights
from mt_eval.generation.exact.batch_invariance import BatchInvariance, agrees_in_tiles
from mt_eval.generation.exact.layers import ExactLayers, make_exact
from mt_eval.generation.exact.packed_weights import PackedWeights

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def cuts(rows):
    return [(0, 1), (4, 5), (3, 10), (1, rows), (rows - 1, rows), (0, 9), (2, 42), (5, 18)]


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
    monkeypatch.setattr(batch_invariance, "agrees_in_tiles", lambda weight, bias, product: False)
    x, weight = torch.randn(5, 8), torch.randn(3, 8)
    with BatchInvariance():
        y = F.linear(x, weight)
    assert torch.equal(y, torch.cat([F.linear(row[None], weight) for row in x]))
    assert agrees_in_tiles(weight, None)


def test_disagreement_of_tiles_is_noticed(monkeypatch):
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: linear(x, *rest) + (len(x) == 8))
    assert not agrees_in_tiles(torch.randn(3, 8), None)


@pytest.mark.parametrize("inputs", [24, 576])
def test_products_with_packed_weights_do_not_depend_on_other_rows(inputs):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((170, inputs), (96, inputs), (96,)))
    arithmetic, plain = BatchInvariance([weight]), BatchInvariance()
    for offset in (None, bias):
        whole = arithmetic.multiply(x, weight, offset)
        assert all(torch.equal(arithmetic.multiply(x[a:b], weight, offset), whole[a:b]) for a, b in cuts(170))
        torch.testing.assert_close(whole, plain.multiply(x, weight, offset), rtol=1e-5, atol=1e-4)


def test_a_weight_that_is_written_to_is_packed_anew():
    x, weight = torch.randn(5, 64), torch.randn(96, 64)
    arithmetic = BatchInvariance([weight])
    before = arithmetic.multiply(x, weight)
    weight.mul_(2)
    torch.testing.assert_close(arithmetic.multiply(x, weight), 2 * before)


def test_only_whole_parameters_are_packed(monkeypatch):
    weight = torch.randn(96, 64)
    packed = PackedWeights([weight, torch.randn(8), torch.randn(8, 8).double()])
    assert packed.find(weight) is not None
    assert packed.find(weight.view(96 * 64 // 32, 32)[:3]) is None
    assert packed.find(weight.mT) is None
    assert packed.find(weight.clone()) is None
    monkeypatch.setattr(packed_weights, "MOST_BYTES", weight.nbytes - 1)
    assert PackedWeights([weight]).find(weight) is None


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_layers_that_are_exact_by_themselves_compute_what_watched_ones_do(name):
    model, arithmetic = make_family(name), BatchInvariance()
    layers, tokens_BT = make_exact(model, arithmetic), torch.arange(12).view(2, 6)
    assert isinstance(layers, ExactLayers)
    with arithmetic:
        expected = model.hidden(tokens_BT)
    with layers:
        assert torch.equal(model.hidden(tokens_BT), expected)
    assert "rotation" not in vars(model)
    assert model.layers["0"].attn.out.op is F.linear


@pytest.mark.parametrize("name", ["gemma2", "mla", "moe"])
def test_layers_of_other_kinds_are_watched(name):
    arithmetic = BatchInvariance()
    assert make_exact(make_family(name), arithmetic) is arithmetic
