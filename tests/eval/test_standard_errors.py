"""Standard errors: lm-evaluation-harness's where it has a formula, else those computed from the single tokens."""

import math
import random
import statistics

import pytest

from mt_eval.standard_errors import (
    compute_influences,
    compute_mean,
    compute_ratio,
    compute_share,
    compute_stderr,
    pair_errors,
)

DRAW = random.Random(5)
DOCUMENTS = [[DRAW.gauss(3 + number % 4, 1) for _ in range(DRAW.randint(1, 30))] for number in range(12)]
"""Losses of the tokens of each document, alike within one."""


def test_the_error_of_a_mean_is_lm_evals():
    metrics = pytest.importorskip("lm_eval.api.metrics")
    for values in ([1, 0, 1, 1, 0], [DRAW.random() for _ in range(50)], [2.0, 2.0]):
        mean, error = compute_mean(values)
        assert mean == pytest.approx(metrics.mean(values), rel=1e-12)
        assert error == pytest.approx(metrics.mean_stderr(values), rel=1e-12)


def test_the_error_of_a_share_is_that_of_its_ones_and_zeros():
    for correct, count in ((3, 5), (0, 4), (7, 7), (1, 2)):
        values = [1] * correct + [0] * (count - correct)
        expected = statistics.stdev(values) / math.sqrt(count)
        assert compute_share(correct, count) == pytest.approx((correct / count, expected), rel=1e-12)
        assert compute_mean(values) == pytest.approx((correct / count, expected), rel=1e-12)


def test_the_error_of_a_mean_over_tokens_is_clustered_by_document():
    tokens = [loss for document in DOCUMENTS for loss in document]
    mean = statistics.fmean(tokens)
    squares = sum(sum(loss - mean for loss in document) ** 2 for document in DOCUMENTS)
    expected = math.sqrt(squares * 12 / 11) / len(tokens)
    totals, sizes = [math.fsum(document) for document in DOCUMENTS], [len(document) for document in DOCUMENTS]
    assert compute_ratio(totals, sizes) == pytest.approx((mean, expected), rel=1e-12)
    left_out = [(sum(totals) - total) / (sum(sizes) - size) for total, size in zip(totals, sizes, strict=True)]
    jackknife = math.sqrt(11 / 12 * sum((each - statistics.fmean(left_out)) ** 2 for each in left_out))
    assert expected == pytest.approx(jackknife, rel=0.1)  # equal to first order in the twelve documents
    assert expected > 1.5 * statistics.stdev(tokens) / math.sqrt(len(tokens))


def test_a_sum_of_two_results_has_the_error_of_their_joint_samples():
    first, second = [1.0, 4.0, 2.0, 8.0], [3.0, 1.0, 1.0, 5.0]
    moved = [a + b for a, b in zip(compute_influences(first), compute_influences(second), strict=True)]
    assert compute_stderr(moved) == pytest.approx(compute_mean([4.0, 5.0, 3.0, 13.0])[1], rel=1e-12)


def test_one_sample_has_no_error():
    assert compute_mean([3.0]) == (3.0, None)
    assert compute_ratio([3.0], [2]) == (1.5, None)
    assert compute_share(1, 1) == (1.0, None)
    assert pair_errors({"a": (1.0, None), "b": (2.0, 0.5)}) == {"a": 1.0, "b": 2.0, "b_stderr": 0.5}
