import pytest
import torch

from mt_core.errors import MtError
from mt_eval.generation.sampling import (
    LIKELIEST,
    SamplingOptions,
    choose_each,
    choose_likeliest,
    choose_sorted,
    choose_tokens,
)

PROBS = [0.1, 0.4, 0.2, 0.3]  # in order of probability: ids 1, 3, 2, 0


def reachable(options, probs=PROBS, steps=1000):
    """Ids that any draw can reach, with their shares of the unit interval."""
    draws_B = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    logits_BV = torch.tensor(probs, dtype=torch.float64).log().expand(steps, -1)
    ids, counts = choose_tokens(logits_BV, options, draws_B).unique(return_counts=True)
    return dict(zip(ids.tolist(), (counts / steps).tolist(), strict=True))


def test_without_filters_every_token_is_drawn_with_its_probability():
    assert reachable(SamplingOptions()) == pytest.approx({0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}, abs=1e-3)


def test_temperature_divides_the_logits():
    squared = torch.tensor(PROBS) ** 2
    assert reachable(SamplingOptions(temperature=0.5)) == pytest.approx(
        dict(enumerate((squared / squared.sum()).tolist())), abs=2e-3
    )


def test_top_k_keeps_the_k_largest():
    assert reachable(SamplingOptions(top_k=2)) == pytest.approx({1: 4 / 7, 3: 3 / 7}, abs=1e-3)


def test_top_k_larger_than_the_vocabulary_keeps_all():
    assert reachable(SamplingOptions(top_k=50)).keys() == {0, 1, 2, 3}


def test_top_k_of_one_is_the_arg_max_and_the_first_of_equals():
    logits_BV = torch.tensor([[0.0, 2.0, 2.0], [3.0, 1.0, 3.0]])
    assert choose_tokens(logits_BV, SamplingOptions(top_k=1), torch.zeros(2)).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.05, {1}),
        (0.39, {1}),
        (0.5, {1, 3}),
        (0.69, {1, 3}),
        (0.75, {1, 3, 2}),
        (0.95, {0, 1, 2, 3}),
        (1.0, {0, 1, 2, 3}),
    ],
)
def test_top_p_keeps_the_token_that_crosses_the_threshold(top_p, kept):
    assert reachable(SamplingOptions(top_p=top_p)).keys() == kept


def test_top_p_keeps_the_token_after_a_sum_that_only_equals_the_threshold():
    assert reachable(SamplingOptions(top_p=0.5), [0.5, 0.25, 0.25]).keys() == {0, 1}


def test_temperature_acts_before_top_p():
    assert reachable(SamplingOptions(temperature=0.2, top_p=0.7)).keys() == {1}


def test_top_p_decays_after_every_token_to_its_bound():
    options = SamplingOptions(top_p=0.8, top_p_decay=0.5, top_p_bound=0.3)
    assert [options.after(n).top_p for n in range(4)] == [0.8, 0.4, 0.3, 0.3]
    assert reachable(options.after(0)).keys() == {1, 3, 2}
    assert reachable(options.after(2)).keys() == {1}


def test_a_top_p_that_has_decayed_to_nothing_leaves_the_likeliest():
    assert reachable(SamplingOptions(top_p=0.8, top_p_decay=0.5).after(5000)).keys() == {1}


def test_rows_are_drawn_by_options_of_their_own():
    logits_BV = torch.tensor(PROBS).log().expand(3, -1)
    options = [SamplingOptions(top_k=1), SamplingOptions(), SamplingOptions(top_k=1)]
    assert choose_each(logits_BV, options, [0.0, 0.99, 0.0]) == [1, 0, 1]


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53, 1.0])
def test_extreme_draws_reach_only_possible_tokens(draw):
    logits_BV = torch.tensor([[-torch.inf, 1.0, -torch.inf]])
    assert choose_tokens(logits_BV, SamplingOptions(), torch.tensor([draw], dtype=torch.float64)).tolist() == [1]


LARGE = {
    "none": SamplingOptions(),
    "top_k": SamplingOptions(top_k=40),
    "top_p": SamplingOptions(top_p=0.9),
    "cold": SamplingOptions(temperature=0.3),
    "hot": SamplingOptions(temperature=3.0),
}


@pytest.mark.parametrize("name", LARGE)
def test_the_likeliest_tokens_give_what_the_whole_vocabulary_gives(name):
    """Peaked and flat logits, in bf16 with many equal ones: the same token from the same draw."""
    options, generator = LARGE[name], torch.Generator().manual_seed(1)
    for scale in (0.01, 1.0, 3.0, 30.0):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            logits_BV = (torch.randn(12, 9000, generator=generator) * scale).to(dtype)
            draws_B = torch.rand(12, generator=generator, dtype=torch.float64)
            expected = choose_sorted(logits_BV, options, draws_B).tolist()
            assert choose_tokens(logits_BV, options, draws_B).tolist() == expected


@pytest.mark.parametrize(("name", "count"), [("top_k", 40), ("cold", 256), ("top_p", 4096), ("none", 4096)])
def test_few_tokens_are_enough_for_most_draws(name, count):
    generator = torch.Generator().manual_seed(3)
    logits_BV, draws_B = torch.randn(50, 9000, generator=generator) * 3, torch.rand(50, generator=generator).double()
    assert choose_likeliest(logits_BV, LARGE[name], draws_B, count)[1].float().mean() > 0.9


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_draws_that_rounding_could_decide_are_left_to_the_whole_vocabulary(name, shift):
    """Draws on the edge between two tokens, and one unit in the last place beside it."""
    options = LARGE[name]
    logits_V = torch.randn(3000, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 4
    probs_V = (logits_V / options.temperature).softmax(-1).sort(descending=True).values
    kept = options.top_k or (probs_V.cumsum(0) <= options.top_p).sum() + 1 if options.top_k or options.top_p else 3000
    edges_B = probs_V[:kept].cumsum(0)[:30] / probs_V[:kept].sum()
    draws_B = torch.nextafter(edges_B, edges_B + shift).clamp(max=1 - 2**-53)
    logits_BV = logits_V.expand(len(draws_B), -1)
    assert not choose_likeliest(logits_BV, options, draws_B, options.top_k or LIKELIEST[0])[1].any()
    assert choose_tokens(logits_BV, options, draws_B).tolist() == choose_sorted(logits_BV, options, draws_B).tolist()


def test_equal_logits_are_drawn_in_the_order_of_their_ids():
    logits_BV = torch.zeros(64, 1000)
    logits_BV[:, 700:710] = 9.0
    draws_B = torch.arange(64, dtype=torch.float64) / 64
    for options in (SamplingOptions(), SamplingOptions(top_k=5), SamplingOptions(top_k=20), SamplingOptions(top_p=0.5)):
        chosen = choose_tokens(logits_BV, options, draws_B).tolist()
        assert chosen == choose_sorted(logits_BV, options, draws_B).tolist()
        if options.top_k == 5:
            assert chosen == [700 + int(draw * 5) for draw in draws_B]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"--temperature: 0.0; above 0, at most 100 \(--top-k 1"),
        ({"temperature": 100.5}, "--temperature: 100.5; above 0, at most 100"),
        ({"temperature": float("nan")}, "--temperature: nan"),
        ({"top_k": -1}, r"--top-k: -1; 0 \(off\) or more"),
        ({"top_p": 1.5}, r"--top-p: 1.5; 0 \(off\) to 1"),
        ({"top_p": 0.9, "top_k": 4}, "--top-k, --top-p: both set; one of the two"),
        ({"top_p": 0.9, "top_p_decay": 1.1}, r"--top-p-decay: 1.1; 0 \(off\) to 1"),
        ({"top_p_decay": 0.5}, "--top-p-decay: there is no top_p that could decay; give --top-p too"),
        ({"top_p": 0.5, "top_p_decay": 0.5, "top_p_bound": 0.6}, "--top-p-bound: 0.6; 0 to --top-p, which is 0.5"),
        ({"top_p": 0.5, "top_p_bound": 0.4}, "--top-p-bound: nothing decays; give --top-p-decay too"),
    ],
)
def test_values_without_meaning_are_refused(options, message):
    with pytest.raises(MtError, match=message):
        SamplingOptions(**options)


def test_all_mistakes_are_told_at_once():
    with pytest.raises(MtError, match=r"--temperature: 0(.|\n)*--top-p: 2"):
        SamplingOptions(temperature=0, top_p=2)
