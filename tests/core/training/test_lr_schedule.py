"""Megatron's learning-rate formulas (docs/specs/core.md §6.9), as a function of finished steps."""

import math

import pytest
from pydantic import ValidationError

from mt_core.config.sections import LRScheduleConfig
from mt_core.training.lr_schedule import learning_rate


def rate(step, *, samples=0, **schedule):
    return learning_rate(LRScheduleConfig(**schedule), 1.0, step, samples=samples, steps=100)


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


@pytest.mark.parametrize("decay", ["linear", "cosine", "inverse_sqrt", "constant", "wsd"])
@pytest.mark.parametrize("warmup", [0, 20])
def test_counted_in_samples_it_is_the_same_function_whatever_the_step(decay, warmup):
    anneal = {"steps": {"anneal_steps": 30}, "samples": {"anneal_samples": 30}} if decay == "wsd" else {}
    steps = {"warmup_steps": warmup, "decay_steps": 90, **anneal.get("steps", {})}
    samples = {"warmup_samples": warmup or None, "decay_samples": 90, **anneal.get("samples", {})}
    for count in (0, 7, 20, 55, 80, 90, 91):
        by_samples = rate(3, samples=count, decay=decay, min_lr=0.1, **samples)
        assert by_samples == rate(count, decay=decay, min_lr=0.1, **steps)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            {"warmup_steps": 2, "decay_samples": 9},
            "decay_samples counts samples, warmup_steps steps; count all of them",
        ),
        ({"decay_samples": 9, "decay_steps": 9}, "decay_samples counts samples, decay_steps steps; count all of them"),
        ({"warmup_samples": 2}, "warmup_samples needs decay_samples, the samples after which the decay ends"),
        ({"anneal_samples": 2}, "anneal_samples needs decay_samples, the samples after which the decay ends"),
        (
            {"warmup_samples": 2, "decay_samples": 9, "warmup_fraction": 0.1},
            "warmup_samples and warmup_fraction are both given; leave one of them out",
        ),
    ],
)
def test_steps_and_samples_are_not_mixed(schedule, message):
    with pytest.raises(ValidationError, match=message):
        LRScheduleConfig(**schedule)
