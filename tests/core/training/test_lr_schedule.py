"""Megatron's learning-rate formulas (docs/specs/core.md §6.9), as a function of finished steps."""

import math

import pytest

from mt_core.config.sections import LRScheduleConfig
from mt_core.training.lr_schedule import learning_rate


def rate(step, **schedule):
    return learning_rate(LRScheduleConfig(**schedule), 1.0, step, steps=100)


def test_warm_up_is_linear_from_zero_and_reaches_the_peak():
    assert [rate(n, warmup_steps=4) for n in (0, 1, 4)] == [0.0, 0.25, 1.0]


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("linear", 0.1 + 0.5 * 0.9),
        ("cosine", 0.1 + (1 + math.cos(math.pi * 0.5)) / 2 * 0.9),
        ("inverse_sqrt", math.sqrt(20) / math.sqrt(60)),
        ("constant", 1.0),
    ],
)
def test_half_way_through_the_decay(decay, expected):
    assert rate(60, warmup_steps=20, decay=decay, min_lr=0.1) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("decay", ["linear", "cosine", "inverse_sqrt"])
def test_after_the_decay_the_rate_is_the_lowest(decay):
    assert rate(91, decay=decay, min_lr=0.1, decay_steps=90) == 0.1


def test_inverse_square_root_never_falls_below_the_floor():
    assert rate(100, decay="inverse_sqrt", warmup_steps=1, min_lr=0.5) == 0.5


@pytest.mark.parametrize(
    ("anneal", "share"),
    [
        ("linear", 0.75),
        ("cosine", (1 + math.cos(math.pi / 4)) / 2),
        ("exponential", 2 * 0.5**0.25 - 1),
        ("minus_sqrt", 0.5),
    ],
)
def test_wsd_is_flat_and_then_anneals(anneal, share):
    schedule = {"decay": "wsd", "anneal_steps": 40, "anneal": anneal}
    assert rate(60, **schedule) == 1.0
    assert rate(70, **schedule) == pytest.approx(share, rel=1e-15)
    assert rate(100, **schedule) == pytest.approx(0.0, abs=1e-15)
