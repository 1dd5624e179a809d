"""A mixture of experts equals its definition, and its balance loss reaches the router by the weight of its sequence."""

import pytest
import torch
from pydantic import ValidationError

from models.parts import MOE, tiny
from mt_models import config
from mt_models.layers.mlp import make_mlp
from mt_models.layers.moe import (
    AuxLosses,
    attach_aux_losses,
    load_balancing_loss,
    multiply_grouped,
    multiply_looped,
    runs_grouped,
    topk_routing,
)

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def experts(**changes):
    part = config.MoE.model_validate(MOE | {"ffn_hidden_size": 5} | changes)
    layer = make_mlp(part, 6).double()
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = normal(*parameter.shape, seed=seed)
    return layer


def normal(*shape, seed=9):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("normalized", [True, False])
def test_a_token_gets_the_weighted_sum_of_its_experts(normalized):
    layer, x_BTD = experts(normalized=normalized), normal(2, 7, 6)
    y_BTD = layer(x_BTD)
    for x_D, y_D in zip(x_BTD.flatten(0, 1), y_BTD.flatten(0, 1), strict=True):
        probabilities_E = (layer.router.weight @ x_D).softmax(0)
        best = probabilities_E.argsort(descending=True)[:2].tolist()
        total = sum(probabilities_E[e] for e in best) if normalized else 1.0
        expected_D = torch.zeros(6, dtype=torch.float64)
        for e in best:
            gate_F, up_F = (layer.experts.gate_up.weight[e, i] @ x_D for i in (0, 1))
            hidden_F = gate_F * gate_F.sigmoid() * up_F
            expected_D = expected_D + probabilities_E[e] / total * (layer.experts.down.weight[e] @ hidden_F)
        torch.testing.assert_close(y_D, expected_D, **EXACT)


def test_an_expert_that_nobody_chose_gets_a_zero_gradient():
    layer = experts(experts=40)
    layer(normal(1, 3, 6)).sum().backward()
    idle_E = (layer.experts.down.weight.grad == 0).flatten(1).all(1)
    assert 34 <= idle_E.sum() < 40


def test_the_router_of_a_bf16_model_computes_in_fp32():
    layer = experts().bfloat16()
    x_BTD = normal(2, 50, 6).bfloat16()
    logits_BTE = x_BTD.float() @ layer.router.weight.float().T
    weights_BTC, chosen_BTC = topk_routing(logits_BTE, 2, normalized=True)
    assert weights_BTC.dtype == torch.float32
    counts_E = torch.bincount(chosen_BTC.flatten(), minlength=4)
    seen = []
    layer.experts.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    assert layer(x_BTD).dtype == torch.bfloat16
    assert torch.equal(seen[0], counts_E)


def test_the_load_balancing_loss_is_one_for_even_choices_and_the_number_of_experts_for_one_favourite():
    even_BTE = torch.eye(4, dtype=torch.float64)[None]
    torch.testing.assert_close(
        load_balancing_loss(even_BTE, torch.arange(4)[None, :, None]), torch.ones(1).double(), **EXACT
    )
    one_BTE = torch.tensor([100.0, 0, 0, 0], dtype=torch.float64).expand(1, 4, 4)
    favourite = load_balancing_loss(one_BTE, torch.zeros(1, 4, 1, dtype=torch.int64))
    torch.testing.assert_close(favourite, torch.full((1,), 4.0).double(), **EXACT)


def test_a_balance_loss_gets_the_gradient_of_all_tokens_of_its_sequence():
    losses_BT, balance_B = (normal(*shape).requires_grad_() for shape in ((2, 3), (2,)))
    weights_BT = torch.tensor([[1.0, 2, 0], [0, 5, 5]]).double()
    aux_losses = AuxLosses()
    aux_losses.losses = [balance_B, 2 * balance_B]
    joined_BT = attach_aux_losses(losses_BT, aux_losses)
    assert torch.equal(joined_BT, losses_BT)
    (joined_BT * weights_BT).sum().backward()
    assert torch.equal(losses_BT.grad, weights_BT)
    assert balance_B.grad.tolist() == [9.0, 30.0]


def router_gradients(make_model, tokens_BT, balance, normalized=True):
    model = make_model(tiny(mlp=MOE | {"aux_loss_coeff": balance, "normalized": normalized}))
    losses_BT = model.token_losses(tokens_BT, tokens_BT.roll(-1, 1))
    losses_BT.mean().backward()
    return losses_BT, [block.mlp.router.weight.grad for block in model.layers.values()]


def test_the_balance_coefficient_changes_gradients_and_no_loss(make_model, tokens_BT):
    (none, without), (half, some), (one, more) = (router_gradients(make_model, tokens_BT, c) for c in (0, 0.5, 1))
    assert torch.equal(none, half)
    assert torch.equal(none, one)
    for a, b, c in zip(without, some, more, strict=True):
        assert not torch.allclose(a, b)
        torch.testing.assert_close(c - a, 2 * (b - a), rtol=1e-9, atol=1e-12)


def test_the_balance_loss_is_the_same_in_one_batch_and_in_single_sequences(make_model, tokens_BT):
    _, together = router_gradients(make_model, tokens_BT, 1.0)
    apart = [router_gradients(make_model, sequence_BT, 1.0)[1] for sequence_BT in tokens_BT.split(1)]
    for whole, *parts in zip(together, *apart, strict=True):
        torch.testing.assert_close(whole, sum(parts) / 2, **EXACT)


def test_recomputed_layers_have_the_same_gradients(make_model, tokens_BT):
    from functools import partial

    from mt_core.parallel.recompute import uniform

    kept, again = (make_model(tiny(mlp=MOE | {"aux_loss_coeff": 1.0})) for _ in range(2))
    again.run = partial(uniform, size=1)
    for model in (kept, again):
        model.token_losses(tokens_BT, tokens_BT.roll(-1, 1)).mean().backward()
    for ours, theirs in zip(kept.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def check_the_grouped_product(device):
    """In bf16, against the loop over experts."""
    counts_E = torch.tensor([3, 0, 40, 21], device=device)
    results = []
    for multiply in (multiply_looped, multiply_grouped):
        x, w = (t.bfloat16().to(device).requires_grad_() for t in (normal(64, 32, seed=1), normal(4, 48, 32, seed=2)))
        y = multiply(x, w, counts_E)
        y.float().sin().sum().backward()
        results.append((y.detach(), x.grad, w.grad))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=2**-7, atol=2**-7 * reference.abs().max().item())


def test_the_grouped_product_equals_the_loop_forward_and_backward():
    check_the_grouped_product("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_grouped_product_equals_the_loop_on_a_gpu():
    check_the_grouped_product("cuda")


def test_only_bf16_on_a_gpu_runs_grouped():
    assert not runs_grouped(torch.zeros(8, 8, dtype=torch.bfloat16), torch.zeros(2, 8, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 5}, "top_k 5 is more than experts 4"),
        ({"top_k": 1}, "with top_k 1 the only weight is always 1, and the router learns nothing: normalized = false"),
    ],
)
def test_impossible_choices_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        tiny(mlp=MOE | changes)
