"""Learning rate as a pure function of the number of steps or samples done; torch-free.

Source: docs/specs/core.md §6.9, Megatron's formulas.
"""

import math

from mt_core.config.sections import LRScheduleConfig


def learning_rate(schedule: LRScheduleConfig, peak: float, step: int, *, samples: int, steps: int) -> float:
    """Rate of the step that follows `step` finished ones of `steps`, and as many `samples` as they had.

    The first step of a warm-up has rate 0.
    """
    warmup, floor, end = schedule.warmup, schedule.min_lr, schedule.get_end(steps)
    count = step if schedule.unit == "steps" else samples
    if warmup and count <= warmup:
        return peak * count / warmup
    if schedule.decay == "constant":
        return peak
    if count > end:
        return floor
    if schedule.decay == "inverse_sqrt":
        return max(floor, peak * math.sqrt(max(warmup, 1)) / math.sqrt(max(count, 1)))
    if schedule.decay == "wsd":
        assert schedule.anneal_length is not None, "checked by the rules of the configuration"
        start = end - schedule.anneal_length
        share = 1.0 if count <= start else anneal_share(schedule.anneal, (count - start) / schedule.anneal_length)
    else:
        done = (count - warmup) / (end - warmup)
        share = 1 - done if schedule.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return floor + share * (peak - floor)


def anneal_share(shape: str, done: float) -> float:
    """What is left of (peak − floor) after the fraction `done` of a "wsd" anneal."""
    shares = {
        "linear": 1 - done,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "exponential": 2 * 0.5**done - 1,
        "minus_sqrt": 1 - math.sqrt(done),
    }
    return shares[shape]
