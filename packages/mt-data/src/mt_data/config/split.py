"""Megatron's `--split`: three shares become three ranges of sequence numbers. Needs no numpy.

Source: docs/specs/data.md §4.2.
"""

import math
from itertools import pairwise

from mt_core.errors import MtError, Problem

SPLITS = ("train", "valid", "test")


def split_problem(split: str) -> Problem | None:
    """What is wrong with a split string, if anything."""
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if 1 <= len(shares) <= len(SPLITS) and all(0 <= s < math.inf for s in shares) and sum(shares) > 0:
        return None
    return Problem("data.split", f"{split!r}", 'up to three shares that are not negative nor all 0, such as "969,30,1"')


def compute_split_ranges(split: str, count: int) -> tuple[range, range, range]:
    """Sequence numbers of training, validation and test; together they are `range(count)`.

    Bounds are sums of normalised shares, added left to right, rounded half to even: the same floats as Megatron's.
    """
    if problem := split_problem(split):
        raise MtError.from_problems([problem])
    shares = [float(share) for share in split.split(",")]
    shares += [0.0] * (len(SPLITS) - len(shares))
    total = sum(shares)
    bounds = [0.0]
    for share in shares:
        bounds.append(bounds[-1] + share / total)
    train, valid, test = (range(round(low * count), round(high * count)) for low, high in pairwise(bounds))
    return train, valid, test


def compute_legacy_ranges(split: str, count: int) -> tuple[range, range, range]:
    """Document numbers of training, validation and test by the rule of ICT (docs/specs/data.md §5.4).

    Rounded shares are added up, and what they exceed `count` by is taken off every bound but the first.
    """
    if problem := split_problem(split.replace("/", ",")):
        raise MtError.from_problems([problem])
    shares = [float(share) for share in split.replace("/", ",").split(",")]
    shares += [0.0] * (len(SPLITS) - len(shares))
    bounds = [0]
    for share in shares:
        bounds.append(bounds[-1] + round(share / sum(shares) * count))
    bounds = [bounds[0], *(bound - (bounds[-1] - count) for bound in bounds[1:])]
    train, valid, test = (range(low, high) for low, high in pairwise(bounds))
    return train, valid, test
