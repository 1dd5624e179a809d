"""Metrics of a run: their receivers, called sinks, and the meter of throughput between two log lines.

metrics.jsonl gets one line a logged step, always; other sinks, such as "tensorboard", are plugins that receive the same
lines.
"""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch

from mt_core.config.run_config import RunConfig, sequence_lengths
from mt_core.contracts import MetricSink
from mt_core.errors import MtError
from mt_core.files import atomic_file, disk_errors
from mt_core.plugins import manager
from mt_core.progress import format_duration
from mt_core.training.state import Position

Metrics = Mapping[str, float | int | str]
FILE = "metrics.jsonl"


class JsonLines:
    """RUN/metrics.jsonl. On resume, lines of steps that will be repeated are dropped, so every step is there once."""

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
        for line in format_metrics(metrics, self.steps):
            print(line, flush=True)

    def close(self) -> None:
        """Nothing to flush."""


def format_metrics(metrics: Metrics, steps: int) -> Iterator[str]:
    """A line for a person: of an evaluation, of a training step, or none of what only files keep."""
    if "valid_loss" in metrics:
        values = {name: value for name, value in metrics.items() if name.startswith("valid_")}
        text = " | ".join(f"{name.replace('valid_', 'validation ')} {value:.4f}" for name, value in values.items())
        yield f"step {metrics['step']}/{steps} | {text}"
    if "loss" in metrics:
        yield (
            f"step {metrics['step']}/{steps} | loss {metrics['loss']:.4f} | lr {metrics['lr']:.2e} | "
            f"grad norm {metrics['grad_norm']:.3f} | {metrics['step_ms']:.0f} ms | "
            f"{metrics['tokens_per_s']:,.0f} tokens/s | {format_duration(float(metrics['eta_s']))} left"
        )


def open_sinks(run_dir: Path, names: Sequence[str], resumed_step: int, screen: MetricSink) -> list[MetricSink]:
    """metrics.jsonl, the screen, and what plugins offer for `names`; an unknown name is reported, not fatal."""
    offered = [s for sinks in manager().hook.mt_metric_sinks(run_dir=run_dir, names=tuple(names)) for s in sinks]
    for name in set(names) - {sink.name for sink in offered}:
        print(f"mt: log.sinks: no installed plugin offers {name!r}", file=sys.stderr)
    return [JsonLines(run_dir / FILE, resumed_step), screen, *offered]


PEAK_FLOPS = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-80GB": 312e12}
"""Dense bf16 peaks by the vendor's datasheets, for the share of peak in metrics."""


class ThroughputMeter:
    """Measures time and tokens between two log lines; evaluations and checkpoints are left out."""

    def __init__(self, config: RunConfig, position: Position, device: torch.device, ranks: int) -> None:
        self._config, self._position, self._device, self._ranks = config, position, device, ranks
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        position = self._position
        self._start = self._now()
        self._step, self._tokens, self._samples = position.step, position.tokens, position.samples

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def lap(self) -> dict[str, float | int]:
        """Return the speed since the last lap, and begin a new interval."""
        steps = self._position.step - self._step
        seconds = (self._now() - self._start) / steps
        lengths = sequence_lengths(self._config.data)
        samples_per_s = (self._position.samples - self._samples) / steps / seconds
        flops = self._config.model.flops_per_token(*lengths) * samples_per_s * lengths[0] / self._ranks
        values: dict[str, float | int] = {
            "step_ms": seconds * 1e3,
            "tokens_per_s": samples_per_s * sum(lengths),
            "trained_tokens_per_s": (self._position.tokens - self._tokens) / steps / seconds,
            "eta_s": seconds * (self._config.train.steps - self._position.step),
            "tflops_per_rank": flops / 1e12,
        }
        if self._device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            if peak := PEAK_FLOPS.get(torch.cuda.get_device_name()):
                values["share_of_peak"] = flops / peak
        self.restart()
        return values


class TensorBoard:
    """Writes every number of a metrics line as a scalar of that name."""

    name: ClassVar[str] = "tensorboard"

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as err:
            raise MtError("log.sinks", "'tensorboard' is not installed", "pip install 'mt-core[tensorboard]'") from err
        self.writer = SummaryWriter(str(directory))

    def write(self, metrics: Mapping[str, float | int | str]) -> None:
        """Record one line."""
        for key, value in metrics.items():
            if key != "step" and not isinstance(value, str):
                self.writer.add_scalar(key, value, int(metrics["step"]))

    def close(self) -> None:
        """Flush the event file."""
        self.writer.close()
