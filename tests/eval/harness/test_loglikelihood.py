import copy
import random

import pytest
import torch

from mt_core.errors import MtError
from mt_eval.finite import NonFiniteOutput
from mt_eval.generation.generate import generate
from mt_eval.generation.sampling import SamplingOptions
from mt_eval.harness.loglikelihood import Continuation, score_continuations

LENGTH = 64
"""Positions of the model."""


def make(context, target):
    return Continuation(tuple(context), tuple(target), "here")


def score_alone(model, continuation):
    """Log-probability and whether it is greedy, by one pass over the last tokens that fit."""
    tokens = [*continuation.context, *continuation.target][-(LENGTH + 1) :]
    log_probs_TV = model(torch.tensor([tokens[:-1]]))[0].log_softmax(-1)[-len(continuation.target) :]
    target_T1 = torch.tensor(continuation.target)[:, None]
    return log_probs_TV.gather(-1, target_T1).sum().item(), bool((log_probs_TV.argmax(-1) == target_T1[:, 0]).all())


@pytest.fixture(scope="module")
def continuations(model):
    """Of all lengths, some that share an input though their targets have other lengths, and one that is greedy."""
    draw = random.Random(1)
    some = [
        make(draw.choices(range(256), k=before), draw.choices(range(256), k=after))
        for before, after in [(1, 1), (5, 3), (30, 30), (64, 1), (63, 3), (200, 5), (2, 64)]
    ]
    shared = [make((7, 8), (9, 10)), make((7, 8, 9), (11,)), make((7, 8, 9), (10,)), make((7,), (8, 9, 12))]
    (new,) = generate(model, [[1, 2, 3]], max_new_tokens=6, options=SamplingOptions(top_k=1))
    return [*some, *shared, make((1, 2, 3), new), make((1, 2, 3), [*new[:-1], new[-1] ^ 1])]


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_scores_equal_a_pass_over_each_alone_in_their_order(model, continuations, batch_size):
    scores = score_continuations(model, continuations, seq_length=LENGTH, batch_size=batch_size)
    for score, continuation in zip(scores, continuations, strict=True):
        log_prob, greedy = score_alone(model, continuation)
        assert (score.log_prob, score.greedy) == (pytest.approx(log_prob, rel=1e-12), greedy)
    assert [score.greedy for score in scores[-2:]] == [True, False]


def test_continuations_of_one_input_are_computed_in_one_row(model, monkeypatch):
    rows = []
    real = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens_BT: rows.append(tokens_BT.shape[0]) or real(tokens_BT))
    score_continuations(model, [make((7, 8), (number,)) for number in range(20)], seq_length=LENGTH)
    assert rows == [1]


def test_all_that_cannot_be_scored_is_said_at_once(model):
    wrong = [make((1,), ()), make((1,), (2,)), make((1,), range(65))]
    with pytest.raises(MtError) as error:
        score_continuations(model, wrong, seq_length=LENGTH)
    assert str(error.value).splitlines() == [
        "here: the continuation has no token beyond its context; a longer one",
        "here: the continuation has 65 tokens, the model reads 64; at most 64: raise --seq-length, or shorten it",
    ]


def test_a_model_that_computes_nan_gives_no_score(model):
    broken = copy.deepcopy(model)
    broken.embed.weight.data[5] = torch.nan
    good = score_continuations(broken, [make((1, 2), (3,))], seq_length=LENGTH)
    assert good == score_continuations(model, [make((1, 2), (3,))], seq_length=LENGTH)
    with pytest.raises(NonFiniteOutput, match="^here: the model computes NaN or infinite logits here; look for"):
        score_continuations(broken, [make((1, 2), (3,)), make((1, 5), (3,))], seq_length=LENGTH)
