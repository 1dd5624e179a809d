"""Standard errors of means and ratios over samples: how far a result would move with other samples of the same kind.

The one thing to know: a mean over tokens is a ratio of two sums over samples, whose error is linearised (Cochran,
Sampling Techniques, on ratio estimates). Where every sample has the same size it is lm-evaluation-harness's
`mean_stderr`.
"""

import math
from collections.abc import Mapping, Sequence


def compute_influences(totals: Sequence[float], sizes: Sequence[float] | None = None) -> list[float]:
    """How much each sample moves Σ totals ÷ Σ sizes, to first order; without sizes each sample has size 1."""
    sizes = [1.0] * len(totals) if sizes is None else sizes
    weight = math.fsum(sizes)
    ratio = math.fsum(totals) / weight
    return [(total - ratio * size) / weight for total, size in zip(totals, sizes, strict=True)]


def compute_stderr(influences: Sequence[float]) -> float | None:
    """The standard error of a result that its samples move so much; None of fewer than two samples.

    Results that are sums, as two losses are, have the sums of their influences.
    """
    count = len(influences)
    if count < 2:
        return None
    return math.sqrt(math.fsum(each * each for each in influences) * count / (count - 1))


def pair_errors(values: Mapping[str, tuple[float, float | None]]) -> dict[str, float]:
    """Each value by its name, and its standard error by `NAME_stderr` where there is one."""
    metrics = dict[str, float]()
    for name, (value, error) in values.items():
        metrics |= {name: value} | ({} if error is None else {f"{name}_stderr": error})
    return metrics


def compute_mean(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of samples and its standard error: their deviation with n − 1 ÷ √n, as in lm-evaluation-harness."""
    return math.fsum(values) / len(values), compute_stderr(compute_influences(values))


def compute_ratio(totals: Sequence[float], sizes: Sequence[float]) -> tuple[float, float | None]:
    """Σ totals ÷ Σ sizes over samples, and its standard error."""
    return math.fsum(totals) / math.fsum(sizes), compute_stderr(compute_influences(totals, sizes))


def compute_share(correct: float, count: float) -> tuple[float, float | None]:
    """The share of samples that are right and its standard error, which is `compute_mean` of as many ones and zeros."""
    share = correct / count
    return share, math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None


def compute_jackknife(without: Sequence[float], counts: Sequence[int] | None = None) -> float | None:
    """The standard error of a result from what it is without each sample; None of fewer than two samples.

    With `counts`, each value is that of so many samples. Of a mean it is `compute_mean`'s.
    """
    counts = [1] * len(without) if counts is None else counts
    total = sum(counts)
    if total < 2:
        return None
    mean = math.fsum(value * count for value, count in zip(without, counts, strict=True)) / total
    squares = math.fsum(count * (value - mean) ** 2 for value, count in zip(without, counts, strict=True))
    return math.sqrt(squares * (total - 1) / total)
