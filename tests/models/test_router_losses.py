"""Losses of a router's: by definition, by scope and with padding, and the weight that they have in the step's loss."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from models.parts import MOE, tiny
from models.test_model_moe import EXACT, experts, normal
from mt_core.distributed.mesh import Mesh
from mt_core.parallel.expert.balance import finish_routing
from mt_core.parallel.recompute import uniform
from mt_models.layers.choices import count_choices
from mt_models.layers.router_losses import RoutingRecord, attach_aux_losses, load_balancing_loss, sum_aux_losses


def router_losses(layer, x_BTD):
    record = RoutingRecord()
    layer.train()(x_BTD, record)
    return record.loss_B


def test_the_z_loss_is_the_mean_square_of_the_logarithm_of_the_sum_of_exponentials():
    layer, x_BTD = experts(z_loss_coeff=0.25), normal(2, 7, 6)
    logits_BTE = x_BTD @ layer.router.weight.T
    torch.testing.assert_close(
        router_losses(layer, x_BTD), 0.25 * logits_BTE.exp().sum(-1).log().square().mean(1), **EXACT
    )


def test_the_balance_loss_of_sigmoid_scores_takes_their_shares_as_probabilities():
    layer, x_BTD = experts(score="sigmoid", aux_loss_coeff=0.5), normal(2, 7, 6)
    scores_BTE = (x_BTD @ layer.router.weight.T).sigmoid()
    counts_BE = torch.stack([torch.bincount(e.flatten(), minlength=4) for e in scores_BTE.topk(2).indices])
    means_BE = (scores_BTE / scores_BTE.sum(-1, keepdim=True)).mean(1)
    expected_B = 0.5 * 4 * (counts_BE.double() / 14 * means_BE).sum(-1)
    torch.testing.assert_close(router_losses(layer, x_BTD), expected_B, **EXACT)


def test_the_load_balancing_loss_is_one_for_even_choices_and_the_number_of_experts_for_one_favourite():
    even_BTE, tokens_B = torch.eye(4, dtype=torch.float64)[None].softmax(-1), torch.tensor([4])
    shares_BE = count_choices(torch.arange(4)[None, :, None], 4) / 4
    torch.testing.assert_close(load_balancing_loss(even_BTE, shares_BE, tokens_B), torch.ones(1).double(), **EXACT)
    one_BTE = torch.tensor([100.0, 0, 0, 0], dtype=torch.float64).softmax(-1).expand(1, 4, 4)
    shares_BE = count_choices(torch.zeros(1, 4, 1, dtype=torch.int64), 4) / 4
    favourite = load_balancing_loss(one_BTE, shares_BE, tokens_B)
    torch.testing.assert_close(favourite, torch.full((1,), 4.0).double(), **EXACT)


def test_a_balance_loss_gets_the_gradient_of_all_tokens_of_its_sequence():
    losses_BT, balance_B = (normal(*shape).requires_grad_() for shape in ((2, 3), (2,)))
    weights_BT = torch.tensor([[1.0, 2, 0], [0, 5, 5]]).double()
    joined_BT = attach_aux_losses(losses_BT, sum_aux_losses([None, balance_B, 2 * balance_B]))
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


SCOPES = ("sequence", "micro_batch", "global_batch")


def test_the_scope_of_a_balance_loss_is_where_choices_are_counted():
    """Whose probabilities are evened out stays each sequence; the global batch is the step so far."""
    first_BTD, second_BTD = normal(3, 7, 6), normal(2, 7, 6, seed=4)
    losses = {}
    for scope in SCOPES:
        layer = experts(aux_loss_coeff=0.5, aux_loss_scope=scope)
        router_losses(layer, first_BTD)
        losses[scope] = router_losses(layer, second_BTD)
    logits_BTE = second_BTD @ layer.router.weight.T
    means_BE = logits_BTE.softmax(-1).mean(1)
    chosen_BN, earlier_N = (
        logits.topk(2).indices.flatten(1) for logits in (logits_BTE, (first_BTD @ layer.router.weight.T).view(1, -1, 4))
    )
    counted = {
        "sequence": [torch.bincount(sample, minlength=4) for sample in chosen_BN],
        "micro_batch": [torch.bincount(chosen_BN.flatten(), minlength=4)],
        "global_batch": [torch.bincount(torch.cat((chosen_BN.flatten(), earlier_N[0])), minlength=4)],
    }
    for scope, counts in counted.items():
        shares_BE = torch.stack([counts_E.double() / counts_E.sum() for counts_E in counts])
        torch.testing.assert_close(losses[scope], 0.5 * 4 * (shares_BE * means_BE).sum(-1), **EXACT)


@pytest.mark.parametrize("scope", SCOPES)
def test_recomputed_layers_have_the_same_gradients_and_count_once(scope, make_model, tokens_BT):
    """Two micro-batches are on their way when the first is recomputed, as in a pipeline."""
    kept, again = (make_model(tiny(mlp=MOE | {"aux_loss_coeff": 1.0, "aux_loss_scope": scope})) for _ in range(2))
    again.run = partial(uniform, size=1)
    for model in (kept, again):
        losses = [model.token_losses(t_BT, t_BT.roll(-1, 1)).mean() for t_BT in (tokens_BT, tokens_BT.flip(1))]
        for loss in losses:
            loss.backward()
    for ours, theirs in zip(kept.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    for ours, theirs in zip(kept.layers.values(), again.layers.values(), strict=True):
        assert torch.equal(ours.mlp.router.load, theirs.mlp.router.load)
        assert theirs.mlp.router.load.sum() == 2 * tokens_BT.numel() * 2


BUSY = {
    **{"score": "sigmoid", "expert_bias": True, "capacity_factor": 0.7, "jitter": 0.1, "z_loss_coeff": 0.3},
    **{"aux_loss_coeff": 0.5, "shared_ffn_hidden_size": 8, "shared_gate": True},
}


@pytest.mark.parametrize(("scope", "policy"), [*zip(SCOPES, ("probability", "position", "probability"), strict=True)])
def test_padding_changes_no_loss_no_gradient_and_no_count(scope, policy, make_model, tokens_BT):
    model = make_model(tiny(mlp=MOE | BUSY | {"aux_loss_scope": scope, "drop_policy": policy}))
    labels_BT, keys_B = tokens_BT.roll(-1, 1), torch.tensor([3, 4, 5], dtype=torch.int32)[: len(tokens_BT)]
    found = []
    mask_BT = torch.ones_like(tokens_BT)
    for padding in ((0, 0), (0, 4)):
        more = {"padding_mask_BT": F.pad(mask_BT, padding)} if padding[1] else {}
        tokens, labels = (F.pad(t, padding, value=7) for t in (tokens_BT, labels_BT))
        losses_BT = model.token_losses(tokens, labels, dropout_keys_B=keys_B, **more)[:, : tokens_BT.shape[1]]
        gradients = torch.autograd.grad(losses_BT.mean(), [*model.parameters()])
        metrics = finish_routing(model, Mesh(), torch.tensor(False))
        assert metrics["dropped_share"] > 0.05
        found.append([losses_BT.detach(), *gradients, *metrics.values()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_padding_passes_through_no_expert_and_without_a_mask_it_does():
    layer, x_BTD = experts(), normal(2, 7, 6)
    mask_BT = torch.tensor([[1, 1, 1, 1, 0, 1, 0], [0] * 7])
    whole_BTD, y_BTD = layer(x_BTD), layer(x_BTD, RoutingRecord(mask_BT))
    torch.testing.assert_close(y_BTD, torch.where(mask_BT[..., None] > 0, whole_BTD, 0), **EXACT)
    assert not y_BTD[mask_BT == 0].any()
    assert whole_BTD.any(-1).all()
    assert layer.router.load.sum() == 2 * (14 + 5)


def test_a_sequence_of_padding_alone_has_no_loss_and_finite_gradients():
    layer = experts(**BUSY | {"jitter": 0.0})
    record = RoutingRecord(torch.tensor([[0] * 7, [1] * 7]))
    layer(normal(2, 7, 6), record)
    assert record.loss_B[0] == 0 < record.loss_B[1]
    record.loss_B.sum().backward()
    assert layer.router.weight.grad.isfinite().all()
