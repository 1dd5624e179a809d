import copy
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mt_core.errors import MtError
from mt_eval.finite import NonFiniteOutput
from mt_eval.tasks.scoring import TokenizedText, check_stride, compute_perplexity, make_windows, sum_losses

SIZES = st.integers(1, 40).flatmap(
    lambda seq_length: st.tuples(st.integers(0, 200), st.just(seq_length), st.integers(1, seq_length))
)


@given(SIZES)
def test_every_target_is_scored_exactly_once(sizes):
    total, seq_length, stride = sizes
    scored = [t for w in make_windows(total, seq_length, stride) for t in range(w.scored_from, w.stop + 1)]
    assert scored == list(range(1, total))


@given(SIZES)
def test_a_window_fits_the_model_and_scores_something(sizes):
    for window in make_windows(*sizes):
        assert 0 < window.stop - window.start <= sizes[1]
        assert window.start < window.scored_from <= window.stop


@given(SIZES)
def test_windows_after_the_first_score_at_most_the_last_stride_targets(sizes):
    total, seq_length, stride = sizes
    for number, window in enumerate(make_windows(total, seq_length, stride)):
        assert window.start == number * stride
        if number:
            assert window.scored_from == window.start + seq_length - stride + 1


def test_stride_equal_to_the_length_gives_disjoint_windows():
    assert [(w.start, w.stop) for w in make_windows(11, 4, 4)] == [(0, 4), (4, 8), (8, 10)]


def test_a_text_shorter_than_a_window_is_one_window():
    assert [(w.start, w.stop, w.scored_from) for w in make_windows(5, 64, 32)] == [(0, 4, 1)]


def test_the_wikitext_windows_that_score_nothing_are_left_out():
    assert len(list(make_windows(270_329, 1024, 32))) == 8448 - 31


def test_one_window_is_the_models_own_loss(model):
    tokens = torch.randint(0, 257, (40,), generator=torch.Generator().manual_seed(1))
    whole = model.token_losses(tokens[None, :-1], tokens[None, 1:]).sum().item()
    assert sum_losses(model, TokenizedText(tokens.tolist()), seq_length=64, stride=64, batch_size=4) == [
        pytest.approx(whole, rel=1e-12)
    ]


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_each_target_sees_the_context_that_its_window_has(model, stride):
    tokens = torch.randint(0, 257, (30,), generator=torch.Generator().manual_seed(2))
    expected = 0.0
    for target in range(1, 30):
        start = 0 if target <= 8 else -(-(target - 8) // stride) * stride
        expected += model.token_losses(tokens[None, start:target], tokens[None, start + 1 : target + 1])[0, -1].item()
    result = sum_losses(model, TokenizedText(tokens.tolist()), seq_length=8, stride=stride, batch_size=5)
    assert result == [pytest.approx(expected, rel=1e-12)]


def test_tokens_that_a_tokenizer_puts_before_a_text_are_not_scored(model):
    tokens = list(range(50, 80))
    losses = model.token_losses(torch.tensor([tokens[:-1]]), torch.tensor([tokens[1:]]))[0]
    text = TokenizedText(tokens, frozenset((0, 1, 9)))
    expected = sum(losses[place - 1].item() for place in range(1, 30) if place not in (1, 9))
    assert sum_losses(model, text, seq_length=64, stride=64, batch_size=4) == [pytest.approx(expected, rel=1e-12)]
    assert text.num_scored == 27
    assert sum_losses(model, text, seq_length=8, stride=8, batch_size=3) != [pytest.approx(expected, rel=1e-3)]


@pytest.mark.parametrize("stride", [3, 8])
def test_each_document_has_the_losses_of_its_own_tokens(model, stride):
    tokens = [256, *range(50, 60), 256, 7, *range(70, 75), 256, 7, 90]
    text = TokenizedText(tokens, frozenset((12, 19)), ((1, "a"), (13, "b"), (20, "c")))
    single = [
        sum_losses(model, TokenizedText(tokens[: place + 1]), seq_length=8, stride=stride, batch_size=5)[0]
        for place in range(1, len(tokens))
    ]
    losses = [after - before for before, after in pairwise([0.0, *single])]
    kept = [0.0 if place in text.unscored else loss for place, loss in enumerate(losses, 1)]
    expected = [sum(kept[:12]), sum(kept[12:19]), sum(kept[19:])]
    result = sum_losses(model, text, seq_length=8, stride=stride, batch_size=2)
    assert result == pytest.approx(expected, rel=1e-11)
    assert text.count_scored() == [11, 6, 1]
    assert sum(text.count_scored()) == text.num_scored


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_a_loss_that_is_not_finite_is_named_by_its_first_token(model, batch_size):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.embed.weight[99] = math.nan
    text = TokenizedText([256, *range(3, 30), 256, *range(60, 105)], documents=((1, "d.jsonl:1"), (29, "d.jsonl:4")))
    with pytest.raises(NonFiniteOutput) as error:
        sum_losses(broken, text, seq_length=16, stride=16, batch_size=batch_size)
    assert str(error.value) == (
        "d.jsonl:4, token 41: the model computes a loss that is not finite here; "
        "look for NaN and infinity in the weights (mt ckpt inspect), and try --dtype fp32"
    )  # 99 is token 40: the one after it is the first that is predicted from it
    assert error.value.exit_code == 1
    with torch.no_grad():
        broken.embed.weight[99] = 0
        broken.head.weight[7] = math.inf
    with pytest.raises(
        NonFiniteOutput, match=r"d\.jsonl:1, token 1: the model computes a loss that is not finite here"
    ):
        sum_losses(broken, text, seq_length=16, stride=16, batch_size=batch_size)


def test_batch_size_changes_nothing(model):
    tokens = list(range(100))
    one, many = (sum_losses(model, TokenizedText(tokens), seq_length=16, stride=5, batch_size=size) for size in (1, 7))
    assert many == pytest.approx(one, rel=1e-12)


def test_perplexity_stays_finite():
    assert compute_perplexity(2.0) == math.exp(2)
    assert compute_perplexity(1e9) == math.exp(20)


def test_a_stride_longer_than_the_window_is_refused():
    with pytest.raises(MtError, match="--overlapping-eval: 65; 1 to 64"):
        check_stride(65, 64)


def test_a_text_without_a_target_is_refused(model):
    with pytest.raises(MtError, match="--data: 1 tokens; a text of at least two"):
        sum_losses(model, TokenizedText([3]), seq_length=8, stride=8, batch_size=1)
