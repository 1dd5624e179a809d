"""A mixture of experts equals its definition, and its router's losses reach it by the weight of their sequence."""

import re

import pytest
import torch
from pydantic import ValidationError

from models.parts import MOE, tiny
from mt_core.distributed.mesh import Mesh
from mt_core.parallel.dropout import DropoutKeys, jitter_features
from mt_core.parallel.expert.balance import finish_routing
from mt_models import config
from mt_models.layers.expert_products import multiply_grouped, multiply_looped, runs_grouped
from mt_models.layers.mlp import make_mlp
from mt_models.layers.router import choose_experts

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def experts(**changes):
    part = config.MoE.model_validate(MOE | {"ffn_hidden_size": 5} | changes)
    layer = make_mlp(part, 6).double()
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = normal(*parameter.shape, seed=seed)
    return layer


def normal(*shape, seed=9):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ROUTERS = {
    "softmax after the choice": {},
    "softmax before the choice": {"normalized": False},
    "scaled": {"scaling_factor": 2.5},
    "sigmoid": {"score": "sigmoid"},
    "sigmoid, not normalised, scaled": {"score": "sigmoid", "normalized": False, "scaling_factor": 0.5},
    "best 2 of 4 groups, by their best expert": {"groups": 4, "top_groups": 2, "group_best": 1, "normalized": False},
    "best 1 of 2 groups, by sums of 2 logits": {"groups": 2, "top_groups": 1},
    "best 2 of 4 groups, by sums of 2 sigmoids": {"groups": 4, "top_groups": 2, "score": "sigmoid"},
    "shared expert": {"shared_ffn_hidden_size": 7},
    "shared expert with a gate": {"shared_ffn_hidden_size": 7, "shared_gate": True, "normalized": False},
}


def feed(x_D, gate_up_2FD, down_DF):
    gate_F, up_F = (weight @ x_D for weight in gate_up_2FD)
    return down_DF @ (gate_F * gate_F.sigmoid() * up_F)


def route(part, logits_E):
    """The numbers of a token's experts and their weights, by definition."""
    scores_E = logits_E.softmax(0) if part.score == "softmax" else logits_E.sigmoid()
    ranked_E = logits_E if part.score == "softmax" and part.normalized else scores_E
    groups = ranked_E.split(part.experts // part.groups)
    sums = [sum(sorted(group.tolist())[-part.group_best :]) for group in groups]
    allowed = sorted(range(part.groups), key=lambda g: -sums[g])[: part.top_groups or part.groups]
    candidates = [e for e in range(part.experts) if e // (part.experts // part.groups) in allowed]
    best = sorted(candidates, key=lambda e: -ranked_E[e].item())[: part.top_k]
    total = sum(scores_E[e] for e in best) if part.normalized else 1.0
    return {e: scores_E[e] / total * part.scaling_factor for e in best}


def defined(layer, x_BTD):
    """What the layer is to compute, token by token."""
    y_ND = []
    for x_D in x_BTD.flatten(0, 1):
        weights = route(layer.part, layer.router.weight @ x_D)
        y_D = sum(
            w * feed(x_D, layer.experts.gate_up.weight[e], layer.experts.down.weight[e]) for e, w in weights.items()
        )
        if layer.shared is not None:
            shared_D = feed(x_D, layer.shared.gate_up.weight, layer.shared.down.weight)
            gate = (layer.shared_gate.weight @ x_D).sigmoid() if layer.part.shared_gate else 1.0
            y_D = y_D + gate * shared_D
        y_ND.append(y_D)
    return torch.stack(y_ND).view_as(x_BTD)


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_a_token_gets_the_weighted_sum_of_its_experts_and_so_do_gradients(router):
    layer, x_BTD, g_BTD = experts(experts=8, **router), normal(2, 7, 6).requires_grad_(), normal(2, 7, 6, seed=3)
    inputs = [x_BTD, *layer.parameters()]
    y_BTD, expected_BTD = layer(x_BTD), defined(layer, x_BTD)
    torch.testing.assert_close(y_BTD, expected_BTD, **EXACT)
    gradients, expected = (torch.autograd.grad(y, inputs, g_BTD) for y in (y_BTD, expected_BTD))
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_a_router_that_sends_everything_to_one_expert_leaves_the_others_a_zero_gradient():
    layer = experts(top_k=1, normalized=False)
    layer.router.weight.data.zero_()[2] = 100.0
    x_BTD = normal(2, 7, 6).abs()
    y_BTD = layer(x_BTD)
    torch.testing.assert_close(y_BTD, defined(layer, x_BTD), **EXACT)
    y_BTD.sum().backward()
    assert [bool(g.any()) for g in layer.experts.down.weight.grad] == [False, False, True, False]
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_a_bias_changes_who_is_chosen_and_no_weight():
    layer, x_BTD = experts(score="sigmoid", normalized=False, expert_bias=True), normal(2, 7, 6)
    layer.router.bias.copy_(torch.tensor([0.0, 100.0, 0.0, 50.0]))
    weights_BTC, chosen_BTC, _ = layer.router(x_BTD)
    assert torch.equal(chosen_BTC, torch.tensor([1, 3]).expand(2, 7, 2))
    assert torch.equal(weights_BTC, (x_BTD @ layer.router.weight.T).sigmoid()[..., [1, 3]])


def test_a_bias_grows_where_choices_are_few_and_stays_in_a_step_that_is_not_finite():
    layer = experts(score="sigmoid", expert_bias=True, expert_bias_update_rate=0.25)
    layer.router.load += torch.tensor([6, 2, 4, 4])
    finite = torch.tensor(True)
    metrics = finish_routing(layer, Mesh(), finite)
    assert layer.router.bias.tolist() == [-0.25, 0.25, 0, 0]
    assert (metrics["expert_load_max"].item(), metrics["expert_load_min"].item()) == (1.5, 0.5)
    assert not layer.router.load.any()
    layer.router.load += torch.tensor([0, 1, 0, 0])
    finish_routing(layer, Mesh(), ~finite)
    assert layer.router.bias.tolist() == [-0.25, 0.25, 0, 0]


def test_training_counts_choices_and_their_entropy_and_evaluation_does_not():
    layer, x_BTD = experts(), normal(2, 7, 6)
    layer.eval()(x_BTD)
    assert not layer.router.load.any()
    layer.train()(x_BTD)
    logits_NE = (x_BTD @ layer.router.weight.T).flatten(0, 1)
    load_E = torch.bincount(logits_NE.topk(2).indices.flatten(), minlength=4)
    assert torch.equal(layer.router.load, load_E)
    metrics = finish_routing(layer, Mesh(), torch.tensor(True))
    expected = {
        "expert_load_max": load_E.max() / 7,
        "expert_load_min": load_E.min() / 7,
        "dropped_share": torch.tensor(0.0),
        "router_entropy": torch.distributions.Categorical(logits=logits_NE).entropy().mean(),
    }
    torch.testing.assert_close(metrics, {name: v.double() for name, v in expected.items()}, rtol=1e-6, atol=0)


def test_a_bias_stays_wide_where_weights_are_rounded():
    layer = experts(score="sigmoid", expert_bias=True).float()
    layer.router.bias.fill_(1 / 3)
    layer.bfloat16()
    assert layer.router.weight.dtype == torch.bfloat16
    assert torch.equal(layer.router.bias, torch.full((4,), 1 / 3))


def run_with_capacity(layer, x_BTD, capacity):
    """What the layer is to compute if each expert takes so many tokens of a sequence, and the share that it drops."""
    y_BTD, dropped, part = torch.zeros_like(x_BTD), 0, layer.part
    for sample, x_TD in enumerate(x_BTD):
        routes = [route(part, layer.router.weight @ x_D) for x_D in x_TD]
        for e in range(part.experts):
            takers = [(weights[e].item(), t) for t, weights in enumerate(routes) if e in weights]
            takers = sorted(takers, reverse=True) if part.drop_policy == "probability" else takers
            dropped += len(takers[capacity:])
            for _, t in takers[:capacity]:
                y_D = feed(x_TD[t], layer.experts.gate_up.weight[e], layer.experts.down.weight[e])
                y_BTD[sample, t] += routes[t][e] * y_D
    return y_BTD, dropped / (x_BTD[..., 0].numel() * part.top_k)


@pytest.mark.parametrize("policy", ["probability", "position"])
def test_an_expert_that_is_full_drops_the_tokens_of_least_weight_or_the_last(policy):
    layer, x_BTD = experts(capacity_factor=0.5, drop_policy=policy, normalized=False), normal(2, 8, 6)
    y_BTD, (expected_BTD, dropped) = layer(x_BTD), run_with_capacity(layer, x_BTD, 2)
    torch.testing.assert_close(y_BTD, expected_BTD, **EXACT)
    gradients, expected = (
        torch.autograd.grad(y, [*layer.parameters()], normal(2, 8, 6, seed=3)) for y in (y_BTD, expected_BTD)
    )
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    assert finish_routing(layer, Mesh(), torch.tensor(True))["dropped_share"].item() == dropped > 0.2


def test_a_capacity_drops_nothing_in_evaluation_nor_where_there_is_room():
    x_BTD = normal(2, 8, 6)
    tight, wide, dropless = experts(capacity_factor=0.5), experts(capacity_factor=4.0), experts()
    assert torch.equal(tight.eval()(x_BTD), dropless(x_BTD))
    assert torch.equal(wide(x_BTD), dropless(x_BTD))


@pytest.mark.parametrize("factor", [0.5, 1.3, 4.0])
def test_padding_to_capacity_changes_the_rows_of_experts_alone(factor):
    """A capacity of 2, 6 and, since there are no more tokens, 8 of each of two sequences."""
    x_BTD, g_BTD, found = normal(2, 8, 6).requires_grad_(), normal(2, 8, 6, seed=3), []
    for pad in (True, False):
        layer = experts(capacity_factor=factor, pad_to_capacity=pad)
        rows = []
        layer.experts.register_forward_pre_hook(
            lambda module, inputs, rows=rows: rows.append(inputs[0].counts.tolist())
        )
        y_BTD = layer(x_BTD)
        found.append((y_BTD, *torch.autograd.grad(y_BTD, [x_BTD, *layer.parameters()], g_BTD)))
        layer.eval()(x_BTD)
        assert rows[0] == [2 * {0.5: 2, 1.3: 6, 4.0: 8}[factor]] * 4 or not pad
        assert sum(rows[1]) == 2 * 8 * 2
    for padded, plain in zip(*found, strict=True):
        torch.testing.assert_close(padded, plain, **EXACT)


def test_jitter_changes_what_the_router_sees_in_training_alone():
    part = {"jitter": 0.3, "normalized": False}
    layer, x_BTD = experts(**part), normal(2, 7, 6)
    keys = DropoutKeys(torch.tensor([7, 8], dtype=torch.int32), torch.arange(7, dtype=torch.int32))
    assert torch.equal(layer(x_BTD), experts(normalized=False)(x_BTD))
    assert not torch.equal(layer(x_BTD, None, keys), layer(x_BTD))
    long = keys._replace(positions_T=torch.arange(5000, dtype=torch.int32))
    factor_BTD = jitter_features(torch.ones(2, 5000, 6).double(), long, 0.3, 1)
    assert 0.7 <= factor_BTD.min() < 0.7001
    assert 1.2999 < factor_BTD.max() <= 1.3
    assert abs(factor_BTD.mean() - 1) < 0.003
    assert abs(factor_BTD.var() - 0.3**2 / 3) < 0.0005


def test_an_expert_that_nobody_chose_gets_a_zero_gradient():
    layer = experts(experts=40)
    layer(normal(1, 3, 6)).sum().backward()
    idle_E = (layer.experts.down.weight.grad == 0).flatten(1).all(1)
    assert 34 <= idle_E.sum() < 40


def test_the_router_of_a_bf16_model_computes_in_fp32():
    layer = experts().bfloat16()
    x_BTD = normal(2, 50, 6).bfloat16()
    logits_BTE = x_BTD.float() @ layer.router.weight.float().T
    weights_BTC, chosen_BTC, _ = choose_experts(layer.part, logits_BTE)
    assert weights_BTC.dtype == torch.float32
    counts_E = torch.bincount(chosen_BTC.flatten(), minlength=4)
    seen = []
    layer.experts.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].counts))
    assert layer(x_BTD).dtype == torch.bfloat16
    assert torch.equal(seen[0], counts_E)


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
        ({"expert_bias": True}, "expert_bias needs score = \"sigmoid\", not 'softmax'"),
        ({"aux_loss_scope": "micro_batch"}, "aux_loss_scope 'micro_batch' needs a loss: aux_loss_coeff is 0"),
        ({"shared_gate": True}, "shared_gate needs a shared expert: shared_ffn_hidden_size is unset"),
        ({"drop_policy": "position"}, "drop_policy needs a capacity: without capacity_factor nothing is dropped"),
        ({"pad_to_capacity": True}, "pad_to_capacity needs a capacity: without capacity_factor there is none"),
        ({"groups": 3}, "groups 3 do not divide experts 4"),
        ({"groups": 2, "top_groups": 3}, "top_groups 3 is more than groups 2"),
        ({"groups": 4, "top_groups": 1, "group_best": 1}, "top_k 2 is more than the 1 experts of top_groups 1"),
        ({"groups": 4, "top_groups": 2}, "group_best 2 is more than the 1 experts of a group"),
    ],
)
def test_impossible_choices_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        tiny(mlp=MOE | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense_layers": 1}, "dense_layers 1 and dense_ffn_hidden_size None: set both"),
        ({"dense_ffn_hidden_size": 8}, "dense_layers 0 and dense_ffn_hidden_size 8: set both"),
        ({"dense_layers": 2, "dense_ffn_hidden_size": 8}, "mlp.dense_layers 2 leave none of 2 layers for experts"),
    ],
)
def test_dense_layers_have_a_width_and_leave_some_for_experts(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny(mlp=MOE | changes)
