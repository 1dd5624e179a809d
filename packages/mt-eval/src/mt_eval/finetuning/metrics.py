"""GLUE's metrics of predictions, each with its standard error over examples.

Accuracy; of the classes "0" and "1" also the F1 of "1" and Matthews's correlation; of numbers the correlations of
Pearson and Spearman. Standard errors of what is no mean are those of the jackknife: how far the metric moves
when each example in turn is left out (Efron, The Jackknife, the Bootstrap and Other Resampling Plans, chapter 3).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mt_eval.standard_errors import compute_jackknife, compute_share, pair_errors

if TYPE_CHECKING:
    import numpy as np

    from mt_eval.finetuning.predictions import Prediction

Metric = tuple[float, float | None]
"""A value and its standard error."""
YES_NO = ("0", "1")
"""Classes of which the second is what is looked for."""
Confusion = tuple[int, int, int, int]
"""How many are rightly and wrongly said to be "1", and wrongly and rightly said not to be."""


@dataclass(frozen=True, slots=True)
class Quality:
    """How right the predictions of a set are."""

    counts: Mapping[str, int]
    """Examples that have a label, and how many are right; numbers are neither right nor wrong."""
    metrics: Mapping[str, Metric]

    def __str__(self) -> str:
        if not self.counts["labelled"]:
            return "no labels"
        right = f"{self.counts['correct']:,} of " if "correct" in self.counts else ""
        shown = [f"{right}{self.counts['labelled']:,} {'right' if right else 'examples'}"]
        for name, (value, error) in self.metrics.items():
            shown.append(f"{name.replace('_', ' ')} {value:.4f}" + ("" if error is None else f" ± {error:.4f}"))
        return ", ".join(shown)

    def dump(self) -> dict[str, float]:
        """Plain values: the counts, the metrics, and the standard error of `NAME` as `NAME_stderr`."""
        return {**self.counts, **pair_errors(self.metrics)}


def measure(predictions: Sequence["Prediction"]) -> Quality:
    """The quality of predictions, of which those count that have a label."""
    labelled = [each for each in predictions if each.label is not None]
    if predictions and predictions[0].is_number:
        return Quality({"labelled": len(labelled)}, _correlate(labelled))
    correct = sum(each.prediction == each.label for each in labelled)
    metrics = {"accuracy": compute_share(correct, len(labelled))} if labelled else {}
    if labelled and tuple(labelled[0].scores) == YES_NO:
        counts = _count_confusion(labelled)
        metrics |= {"f1": _jackknife(counts, compute_f1), "matthews_correlation": _jackknife(counts, compute_matthews)}
    return Quality({"correct": correct, "labelled": len(labelled)}, metrics)


def _count_confusion(labelled: Sequence["Prediction"]) -> Confusion:
    pairs = [(each.prediction == "1", each.label == "1") for each in labelled]
    return (
        pairs.count((True, True)),
        pairs.count((True, False)),
        pairs.count((False, True)),
        pairs.count((False, False)),
    )


def compute_f1(counts: Confusion) -> float:
    """The harmonic mean of precision and recall of "1"; 0 where nothing is, or is said to be, "1"."""
    hits, false_hits, misses, _ = counts
    return 2 * hits / total if (total := 2 * hits + false_hits + misses) else 0.0


def compute_matthews(counts: Confusion) -> float:
    """The correlation of predictions and labels as numbers; 0 where all of one of them are equal."""
    hits, false_hits, misses, others = counts
    product = (hits + false_hits) * (hits + misses) * (others + false_hits) * (others + misses)
    return (hits * others - false_hits * misses) / math.sqrt(product) if product else 0.0


def _jackknife(counts: Confusion, compute: Callable[[Confusion], float]) -> Metric:
    """A metric, and its standard error: examples of one cell move it alike."""
    without = [compute(_leave_out(counts, cell)) if counts[cell] else 0.0 for cell in range(len(counts))]
    return compute(counts), compute_jackknife(without, counts)


def _leave_out(counts: Confusion, cell: int) -> Confusion:
    a, b, c, d = (count - (place == cell) for place, count in enumerate(counts))
    return a, b, c, d


def _correlate(labelled: Sequence["Prediction"]) -> dict[str, Metric]:
    """Both correlations; none where predictions or labels are all equal, which have none."""
    import numpy as np

    x = np.array([float(each.prediction) for each in labelled])
    y = np.array([float(each.label or 0) for each in labelled])
    if len({*x.tolist()}) < 2 or len({*y.tolist()}) < 2:
        return {}
    return {"pearson": compute_pearson(x, y), "spearman": compute_spearman(x, y)}


def compute_pearson(x: "np.ndarray", y: "np.ndarray") -> Metric:
    """Pearson's correlation of two arrays [N] that are not constant."""
    return _correlate_sums(x, y), _jackknife_pairs(len(x), lambda i: _correlate_sums(_drop(x, i), _drop(y, i)))


def compute_spearman(x: "np.ndarray", y: "np.ndarray") -> Metric:
    """Spearman's correlation of two arrays [N] that are not constant: Pearson's of ranks, equal ones sharing theirs."""
    ranks_x, ranks_y = rank(x), rank(y)

    def leave_out(i: int) -> float:
        return _correlate_sums(_drop(ranks_x - _count_above(x, i), i), _drop(ranks_y - _count_above(y, i), i))

    return _correlate_sums(ranks_x, ranks_y), _jackknife_pairs(len(x), leave_out)


def rank(x: "np.ndarray") -> "np.ndarray":
    """The rank of each value, from 1; equal ones have the mean of theirs."""
    import numpy as np

    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place]


def _count_above(x: "np.ndarray", i: int) -> "np.ndarray":
    """How much lower each rank is without value i."""
    return (x > x[i]) + (x == x[i]) / 2


def _drop(x: "np.ndarray", i: int) -> "np.ndarray":
    import numpy as np

    return np.concatenate([x[:i], x[i + 1 :]])


def _correlate_sums(x: "np.ndarray", y: "np.ndarray") -> float:
    """The correlation; NaN where one is constant."""
    x, y = x - x.mean(), y - y.mean()
    product = float(x @ x) * float(y @ y)
    return float(x @ y) / math.sqrt(product) if product > 0 else math.nan


def _jackknife_pairs(count: int, leave_out: Callable[[int], float]) -> float | None:
    """The standard error; None where there is no correlation without some example."""
    without = [leave_out(i) for i in range(count)]
    return None if any(map(math.isnan, without)) else compute_jackknife(without)
