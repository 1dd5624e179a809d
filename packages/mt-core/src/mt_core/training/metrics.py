"""metrics.jsonl: one line a logged step, always written; other sinks are plugins that receive the same lines."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from mt_core.files import atomic_file, disk_errors
from mt_core.plugins import manager
from mt_core.types import MetricSink

Metrics = Mapping[str, float | int | str]
FILE = "metrics.jsonl"


class JsonLines:
    """RUN/metrics.jsonl. On resume, lines of steps that will run again are dropped, so every step is there once."""

    name: ClassVar[str] = "jsonl"

    def __init__(self, path: Path, resumed_step: int) -> None:
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= resumed_step]
        with atomic_file(path, "w") as file:
            file.writelines(kept)
        self.file = path.open("a", encoding="utf-8")
        self.path = path

    def write(self, metrics: Metrics) -> None:
        """Append one line and flush it."""
        with disk_errors(self.path):
            self.file.write(json.dumps(metrics) + "\n")
            self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _lines(path: Path) -> Iterable[str]:
    """Whole lines of an earlier run; the last may have been cut off by a kill."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


class PlainLines:
    """One readable line a logged step, on stdout."""

    name: ClassVar[str] = "plain"

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def write(self, metrics: Metrics) -> None:
        """Print the line."""
        if "valid_loss" in metrics:
            values = {name: value for name, value in metrics.items() if name.startswith("valid_")}
            text = " | ".join(f"{name.replace('valid_', 'validation ')} {value:.4f}" for name, value in values.items())
            print(f"step {metrics['step']}/{self.steps} | {text}", flush=True)
        if "loss" not in metrics:
            return
        print(
            f"step {metrics['step']}/{self.steps} | loss {metrics['loss']:.4f} | lr {metrics['lr']:.2e} | "
            f"grad norm {metrics['grad_norm']:.3f} | {metrics['step_ms']:.0f} ms | "
            f"{metrics['tokens_per_s']:,.0f} tokens/s | {time_left(float(metrics['eta_s']))} left",
            flush=True,
        )

    def close(self) -> None:
        """Nothing to flush."""


def time_left(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"


def open_sinks(run_dir: Path, names: Sequence[str], resumed_step: int, screen: MetricSink) -> list[MetricSink]:
    """metrics.jsonl, the screen, and what plugins offer for `names`; an unknown name is told, not fatal."""
    offered = [s for sinks in manager().hook.mt_metric_sinks(run_dir=run_dir, names=tuple(names)) for s in sinks]
    for name in set(names) - {sink.name for sink in offered}:
        print(f"mt: log.sinks: no installed plugin offers {name!r}", file=sys.stderr)
    return [JsonLines(run_dir / FILE, resumed_step), screen, *offered]
