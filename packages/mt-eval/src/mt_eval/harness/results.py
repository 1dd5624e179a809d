"""Results of lm-evaluation-harness in the manner of mt: a table for people, JSON and one line a sample for programs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mt_eval.report import write_samples

KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better", "configs")
"""Parts of lm-eval's own document that are written as they are, under `lm_eval`."""
HEADER = ("task", "shots", "samples", "metric", "value", "± stderr")


def list_metrics(results: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float | None]]:
    """Task or group, metric, value and standard error (None if there is none) of each number.

    A metric of answers that a filter took from the text is `metric,filter`.
    """
    for task, values in (results["results"] | results.get("groups", {})).items():
        for key, value in sorted(values.items()):
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{chosen}")
            name = metric if chosen == "none" else key
            yield task, name, float(value), float(error) if isinstance(error, int | float) else None


def flatten(results: Mapping[str, Any]) -> dict[str, float]:
    """Each finite number by `task.metric`, and its standard error by `task.metric_stderr`."""
    flat: dict[str, float] = {}
    for task, metric, value, error in list_metrics(results):
        flat |= {f"{task}.{metric}": value} | ({} if error is None else {f"{task}.{metric}_stderr": error})
    return {name: value for name, value in flat.items() if math.isfinite(value)}


def make_table(results: Mapping[str, Any]) -> list[str]:
    """Lines of a table with a row for each number."""
    rows: list[tuple[str, ...]] = [HEADER]
    for task, metric, value, error in list_metrics(results):
        shots, samples = results["n-shot"].get(task, ""), results["n-samples"].get(task, {}).get("effective", "")
        rows.append((task, str(shots), str(samples), metric, f"{value:.4f}", "" if error is None else f"{error:.4f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def write_all_samples(output: Path, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write a file of JSON lines for each task: a sample with its requests, the model's answers and its metrics."""
    from lm_eval.utils import handle_non_serializable

    for task, lines in samples.items():
        write_samples(output, task, lines, handle_non_serializable)


def to_plain(value: object) -> Any:
    """The value as JSON can hold it: text for what it has no form for, null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [to_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
