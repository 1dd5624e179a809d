"""BERT and T5: their weights under canonical names, their losses, and what they refuse."""

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from models.encoders import BERT, HEADLESS, MODELS, T5, bert, t5
from models.parts import COMBINATIONS
from models.test_model_canonical import random_like_parameters
from mt_core.errors import MtError
from mt_models.canonical import canonical_state, list_stored
from mt_models.config import GQA
from mt_models.layers.attention_cores import ScoreMods, eager, sdpa
from mt_models.rules import group_fused


@pytest.mark.parametrize("config", [*COMBINATIONS.values(), *MODELS.values()], ids=[*COMBINATIONS, *MODELS])
def test_rules_know_without_torch_which_tensors_are_one_parameter(config):
    with torch.device("meta"):
        model = config.build()
    fused = {name: [*model.canonical_regions(name)] for name, _ in list_stored(model)}
    assert group_fused(config.canonical_tensors()) == fused


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_a_round_trip_is_bit_exact_and_has_the_declared_names_and_shapes(config):
    with torch.device("meta"):
        model = config.build()
    tensors = random_like_parameters(model, torch.float32)
    for name in tensors.keys() & {"head.bias"}:
        tensors[name][config.vocab_size :] = 0
    canonical = [pair for name, tensor in tensors.items() for pair in model.to_canonical(name, tensor)]
    assert {name: tuple(t.shape) for name, t in canonical} == config.canonical_shapes()
    assert len(canonical) == len(config.canonical_shapes())
    for name, tensor in tensors.items():
        assert torch.equal(model.from_canonical(name, dict(canonical).__getitem__), tensor), name


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_the_ranks_parts_make_up_every_tensor(config):
    """Of four ranks, two share a key/value group where there are only two."""
    with torch.device("meta"):
        model = config.build(4)
    whole = {name: torch.randn(shape) for name, shape in config.canonical_shapes().items()}
    assembled = {name: torch.full_like(tensor, math.nan) for name, tensor in whole.items()}
    for name, _ in model.named_parameters():
        for rank in range(4):
            part = model.from_canonical(name, whole.__getitem__, rank, 4)
            boxes = model.canonical_regions(name, rank, 4)
            for canonical, tensor in model.to_canonical(name, part, rank, 4):
                assembled[canonical][boxes[canonical] or ...] = tensor
    for name, tensor in whole.items():
        assert torch.equal(assembled[name], tensor), name


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_norms_begin_at_one_biases_at_zero_and_projections_into_the_residual_stream_small(config, make_model):
    state = canonical_state(make_model(config))
    for name, tensor in state.items():
        if name.endswith("bias"):
            assert not tensor.any(), name
        elif name.endswith("norm.weight"):
            assert (tensor == 1).all(), name
        elif tensor.numel() > 1000:  # enough to see the deviation
            layers = 3 if name.startswith("decoder") else 2
            narrow = name.endswith((".out.weight", ".down.weight"))
            assert tensor.std() == pytest.approx(0.02 / (2 * layers) ** 0.5 if narrow else 0.02, rel=0.1), name


@torch.no_grad()
def test_the_language_model_head_may_have_an_activation_of_its_own(make_model):
    model = make_model(bert(head_activation="gelu_tanh"))
    x_BTD = torch.randn(2, 3, 32, dtype=torch.float64)
    expected = model.lm_head.norm(F.gelu(model.lm_head.dense(x_BTD), approximate="tanh"))
    assert torch.equal(model.lm_head(x_BTD), expected)


def test_two_stacks_of_t5_begin_with_different_weights(make_model):
    state = canonical_state(make_model(t5()))
    assert not torch.equal(state["encoder.layers.0.attn.q.weight"], state["decoder.layers.0.attn.q.weight"])


def test_bert_s_losses_are_those_of_its_logits_and_of_each_sample(make_model, tokens_BT):
    model = make_model(bert(init_std=0.3))
    labels_BT, order_B = tokens_BT.roll(1, 1), torch.tensor([1, 0])
    losses_BT, losses_B, metrics, *names = model.losses(tokens_BT, labels_BT, is_random_next_B=order_B)
    x_BTD = model.hidden(tokens_BT)
    expected_BT = F.cross_entropy(model(tokens_BT).mT, labels_BT, reduction="none")
    torch.testing.assert_close(losses_BT, expected_BT, rtol=1e-12, atol=1e-12)
    expected_B = F.cross_entropy(model.nsp_logits(x_BTD), order_B, reduction="none")
    torch.testing.assert_close(losses_B, expected_B, rtol=1e-12, atol=1e-12)
    hits = int((model.nsp_logits(x_BTD).argmax(-1) == order_B).sum())
    assert {name: (float(m.total), float(m.weight)) for name, m in metrics.items()} == {
        "sentence_order_accuracy": (hits, 2)
    }
    assert names == ["masked_lm_loss", "sentence_order_loss"]


def test_places_without_a_label_have_a_finite_loss_that_a_mask_can_take_out(make_model, tokens_BT):
    labels_BT = torch.full_like(tokens_BT, -1)
    for config, more in ((bert(), {}), (t5(), {"encoder_tokens_BS": tokens_BT})):
        losses = make_model(config).losses(tokens_BT, labels_BT, **more)
        assert losses.tokens.isfinite().all()


def test_without_an_order_or_a_head_for_it_there_is_no_loss_of_samples(make_model, tokens_BT):
    assert make_model(bert()).losses(tokens_BT, tokens_BT).samples is None
    silent = make_model(bert(pooler=False, binary_head=False))
    assert silent.losses(tokens_BT, tokens_BT, is_random_next_B=torch.tensor([1, 0])).samples is None


def test_t5_s_losses_are_those_of_its_logits(make_model, tokens_BT):
    model = make_model(t5(init_std=0.3, tied=True, scaled_head=True, head_bias=True))
    labels_BT = tokens_BT.roll(-1, 1)
    losses_BT = model.losses(tokens_BT, labels_BT, encoder_tokens_BS=tokens_BT.flip(1)).tokens
    expected_BT = F.cross_entropy(model(tokens_BT.flip(1), tokens_BT).mT, labels_BT, reduction="none")
    torch.testing.assert_close(losses_BT, expected_BT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", [bert(init_std=0.3), t5(init_std=0.3), MODELS["t5 of Megatron"]])
def test_padding_changes_nothing_for_the_text(config, make_model, tokens_BT):
    model, length = make_model(config), 7
    padding = (torch.arange(12) < length).long().expand(tokens_BT.shape)
    inputs = (None,) if config.kind == "bert" else (tokens_BT[:, :5],)
    padded, short = model(tokens_BT, *inputs, padding), model(tokens_BT[:, :length], *inputs)
    torch.testing.assert_close(padded[:, : short.shape[1]], short, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", [bert(), t5()])
def test_a_sequence_that_is_too_long_is_refused(config, make_model):
    with pytest.raises(MtError, match=r"a sequence of 41 tokens; at most model.max_seq_len = 40"):
        make_model(config)(torch.zeros(1, 41, dtype=torch.int64))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("G", [2, 4])
def test_sdpa_and_eager_agree_on_bias_and_direction(masked, biased, bidirectional, G):
    source = torch.Generator().manual_seed(0)
    shapes = ((2, 9, 4, 6), (2, 9, G, 6), (2, 9, G, 6))
    inputs = [torch.randn(s, generator=source, dtype=torch.float64) for s in shapes]
    text_BS = (torch.arange(9) < torch.tensor([[9], [4]])).long()
    more = {"padding_mask_BS" if bidirectional else "segment_ids_BS": text_BS} if masked else {}
    more |= {"bias_HTS": torch.randn(4, 9, 9, generator=source, dtype=torch.float64)} if biased else {}
    scores = ScoreMods(scale=0.7, bidirectional=bidirectional, biased=biased)
    results = [core.with_scores(scores)(*inputs, **more) for core in (eager, sdpa)]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_a_core_that_is_only_causal_is_refused_by_name():
    assert sdpa.unsupported_reason(torch.device("cpu"), frozenset({"bidirectional", "biased"})) == ""
    causal = type(sdpa)(sdpa.attend, 1)
    assert causal.unsupported_reason(torch.device("cpu"), frozenset({"bidirectional"})) == "has no bidirectional"


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (bert, {"pooler": False}, "binary_head needs pooler"),
        (bert, {"attention": BERT["attention"] | {"window": 4}}, "attention.window is for models in which"),
        (t5, {"attention": T5["attention"] | {"window": 4}}, "attention.window is for models in which"),
        (t5, {"position": {"kind": "relative", "buckets": 6}}, "buckets 6 is no multiple of 4"),
        (t5, {"position": {"kind": "relative", "max_distance": 16}}, "max_distance 16 is not above half of buckets 32"),
    ],
)
def test_impossible_settings_are_refused(make, changes, message):
    with pytest.raises(ValidationError, match=message):
        make(**changes)


def test_flops_of_an_encoder_are_six_a_matrix_parameter_and_all_of_full_attention():
    matrices = 2 * (4 * 32 * 32 + 2 * 32 * 48)
    attention = 12 * 2 * 4 * 8 * 40
    assert bert(**HEADLESS).flops_per_token(40) == 6 * matrices + attention
    assert bert().flops_per_token(40) == 6 * (matrices + 32 * 32 + 99 * 32) + attention


def test_flops_of_a_decoder_count_half_of_its_own_and_all_of_the_encoder_s_sequence():
    attention, mlp = 4 * 24 * 32, 3 * 32 * 48
    matrices = 2 * (attention + mlp) + 3 * (2 * attention + mlp) + 99 * 32
    assert t5().flops_per_token(40) == 6 * matrices + 12 * 24 * (2 + 3 * 1.5) * 40


def test_flops_of_a_shorter_decoder_are_fewer_but_for_what_it_does_with_the_encoder_s_tokens():
    attention, mlp, across = 4 * 24 * 32, 3 * 32 * 48, 2 * 24 * 32
    of_encoder = 2 * (attention + mlp) + 3 * across
    of_decoder = 3 * (2 * attention + mlp - across) + 99 * 32
    keys_of_encoder, keys_of_decoder = 2 * 40, 3 * (40 + 10 / 2)
    assert t5().flops_per_token(40, 10) == 6 * (of_encoder + of_decoder / 4) + 12 * 24 * (
        keys_of_encoder + keys_of_decoder / 4
    )


def test_groups_are_copied_where_there_are_more_ranks():
    part = GQA(heads=8, num_kv_heads=2, head_size=4)
    assert (part.queries_per_group, part.count_kv_replicas(1), part.count_kv_replicas(8)) == (4, 1, 4)
