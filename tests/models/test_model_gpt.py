"""GPT as a whole: every combination of parts trains, no token sees the future, padding has no part in anything."""

import pytest
import torch

from models.parts import COMBINATIONS, LEARNED, tiny
from mt_core.errors import MtError
from mt_models.canonical import canonical_state, load_canonical
from mt_models.models.gpt import round_to_dtype


@pytest.mark.parametrize("config", COMBINATIONS.values(), ids=COMBINATIONS)
def test_every_parameter_gets_a_finite_gradient(config, make_model, tokens_BT):
    model = make_model(config)
    model.token_losses(tokens_BT, tokens_BT.roll(-1, 1)).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_forward_gives_logits_of_the_true_vocabulary(make_model, tokens_BT):
    assert make_model(tiny())(tokens_BT).shape == (2, 12, 37)


def test_token_losses_are_the_negative_log_probabilities_of_the_labels(make_model, tokens_BT):
    model = make_model(tiny())
    labels_BT = tokens_BT.roll(-1, 1)
    log_probabilities_BTV = model(tokens_BT).detach().softmax(-1).log()
    expected_BT = torch.tensor(
        [[-log_probabilities_BTV[b, t, labels_BT[b, t]] for t in range(12)] for b in range(2)], dtype=torch.float64
    )
    torch.testing.assert_close(model.token_losses(tokens_BT, labels_BT).detach(), expected_BT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_losses_are_fp32_or_wider(dtype, wide, make_model, tokens_BT):
    assert make_model(tiny(), dtype=dtype).token_losses(tokens_BT, tokens_BT).dtype == wide


def test_a_model_runs_under_autocast(make_model, tokens_BT):
    model = make_model(tiny(), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        losses_BT = model.token_losses(tokens_BT, tokens_BT)
    assert losses_BT.dtype == torch.float32
    torch.testing.assert_close(losses_BT, model.token_losses(tokens_BT, tokens_BT), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", [name for name in COMBINATIONS if "-groups-" in name])
def test_no_position_sees_a_later_token(name, make_model, tokens_BT):
    model = make_model(COMBINATIONS[name])
    changed_BT = tokens_BT.clone()
    changed_BT[:, 7] = (tokens_BT[:, 7] + 1) % 37
    same_BT = (model(tokens_BT) == model(changed_BT)).all(-1)
    assert same_BT[:, :7].all()
    assert not same_BT[:, 7:].any()


@pytest.mark.parametrize("tied", [False, True])
def test_padding_rows_change_nothing(tied, make_model, tokens_BT):
    padded, plain = (make_model(tiny(tied=tied, vocab_divisor=divisor)) for divisor in (128, 1))
    assert (padded.embed.weight.shape[0], plain.embed.weight.shape[0]) == (128, 37)
    with torch.no_grad():
        for table in [padded.embed] + ([] if tied else [padded.head]):
            table.weight[37:] = 1e3
    for model in (padded, plain):
        model.token_losses(tokens_BT, tokens_BT).sum().backward()
    torch.testing.assert_close(padded(tokens_BT), plain(tokens_BT), rtol=1e-12, atol=1e-12)
    gradients = [
        dict(pair for name, p in model.named_parameters() for pair in model.to_canonical(name, p.grad))
        for model in (padded, plain)
    ]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)
    assert not padded.embed.weight.grad[37:].any()


def test_a_tied_model_computes_what_an_untied_one_with_equal_weights_does(make_model, tokens_BT):
    tied, untied = make_model(tiny(tied=True)), make_model(tiny())
    state = canonical_state(tied)
    load_canonical(untied, (state | {"head.weight": state["embed.weight"]}).__getitem__)
    assert torch.equal(tied(tokens_BT), untied(tokens_BT))


@pytest.mark.parametrize("position", [LEARNED, {"kind": "rope"}, {"kind": "none"}], ids=lambda p: p["kind"])
def test_a_sequence_longer_than_the_positions_is_an_error(position, make_model):
    with pytest.raises(MtError, match=r"tokens: a sequence of 17 tokens; at most model\.max_seq_len = 16"):
        make_model(tiny(position=position))(torch.zeros(1, 17, dtype=torch.int64))


def test_building_draws_no_random_numbers_and_keeps_the_default_dtype():
    before = torch.get_rng_state()
    with torch.device("meta"):
        assert next(tiny().build().parameters()).is_meta
    tiny(position=LEARNED).build()
    assert torch.equal(torch.get_rng_state(), before)


def test_capped_logits_stay_within_the_cap_and_have_the_losses_of_the_cap(make_model, tokens_BT):
    capped, plain = make_model(tiny(logit_softcap=0.5)), make_model(tiny())
    logits_BTV = plain(tokens_BT).detach()
    torch.testing.assert_close(capped(tokens_BT).detach(), 0.5 * (logits_BTV / 0.5).tanh(), rtol=1e-12, atol=1e-12)
    losses_BT = capped.token_losses(tokens_BT, tokens_BT).detach()
    expected_BT = -capped(tokens_BT).detach().log_softmax(-1).gather(-1, tokens_BT[..., None])[..., 0]
    torch.testing.assert_close(losses_BT, expected_BT, rtol=1e-12, atol=1e-12)


def test_the_factor_of_embeddings_is_rounded_to_their_dtype():
    assert round_to_dtype(48**0.5, torch.bfloat16) == 6.9375
    assert round_to_dtype(48**0.5, torch.float64) == 48**0.5
