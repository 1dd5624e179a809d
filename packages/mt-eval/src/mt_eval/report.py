"""Results of an evaluation: a table for people, JSON for programs, and a line of JSON for each sample.

A metric `NAME` may have its standard error beside it, as the metric `NAME_stderr`.
"""

import json
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from mt_core.errors import MtError, Problem
from mt_core.files import atomic_file, disk_errors
from mt_eval.finite import ADVICE, NonFiniteOutput

Value = int | float | str
Sample = Mapping[str, Any]
STDERR = "_stderr"
"""What the names of standard errors end with."""


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured, on what, and how."""

    task: str
    model: str
    data: str
    metrics: Mapping[str, float]
    counts: Mapping[str, int]
    settings: Mapping[str, Value]
    seconds: float

    def document(self) -> dict[str, Any]:
        """Plain values for JSON, with the versions that computed them."""
        versions = {"python": platform.python_version()} | {name: version(name) for name in ("torch", "mt-eval")}
        return asdict(self) | {"versions": versions}

    def rows(self) -> Iterator[tuple[str, str]]:
        """Name and value of every line of the table."""
        yield from (("model", self.model), ("data", self.data))
        for name, value in self.metrics.items():
            error = self.metrics.get(f"{name}{STDERR}")
            if not name.endswith(STDERR):
                yield name, f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
        yield from ((name, f"{value:,}") for name, value in self.counts.items())
        yield from ((name, str(value)) for name, value in self.settings.items())
        yield "seconds", f"{self.seconds:.1f}"


def check_output(path: Path | None) -> None:
    """Refuse, before the work is done, an output whose directory is missing or that cannot be written there."""
    if path is None:
        return
    if path.is_dir():
        raise MtError("--output", f"{path} is a directory", "the name of a file")
    if not path.absolute().parent.is_dir():
        raise MtError("--output", f"{path}: its directory does not exist", "create it first")
    with disk_errors(path), TemporaryFile(dir=path.absolute().parent):
        pass


def publish(report: Report, output: Path | None = None, samples: Iterable[Sample] = ()) -> None:
    """Print the table on stdout, then write the JSON file and the samples, each whole or not at all.

    Metrics have to be finite. What is printed is there even if a disk has no room for the samples.
    """
    wrong = {name: value for name, value in report.metrics.items() if not isfinite(value)}
    if wrong:
        raise NonFiniteOutput.from_problems(
            Problem(report.task, f"{name} is {value}", ADVICE) for name, value in wrong.items()
        )
    if sys.stdout.isatty():
        _print_table(report)
    else:
        rows = [(name.replace("_", " "), value) for name, value in report.rows()]
        width = max(len(name) for name, _ in rows)
        print(report.task, *(f"{name:<{width}}  {value}" for name, value in rows), sep="\n", flush=True)
    if output is not None:
        write_document(output, report.document())
        write_samples(output, report.task, samples)


def write_document(output: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic_file(output, "w") as file:
        file.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def name_samples(output: Path, task: str) -> Path:
    """The file of a task's samples: `results.lambada.jsonl` beside `results.json`."""
    return output.with_name(f"{output.stem}.{task.replace('/', '_')}.jsonl")


def write_samples(
    output: Path, task: str, samples: Iterable[Sample], default: Callable[[Any], Any] | None = None
) -> None:
    """Write a line of JSON for each sample of a task, whole or not at all; `default` makes plain values of others."""
    with atomic_file(name_samples(output, task), "w") as file:
        file.writelines(json.dumps(sample, ensure_ascii=False, default=default) + "\n" for sample in samples)


def _print_table(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=report.task, show_header=False)
    for name, value in report.rows():
        table.add_row(name.replace("_", " "), value, style="bold" if name in report.metrics else None)
    Console().print(table)
