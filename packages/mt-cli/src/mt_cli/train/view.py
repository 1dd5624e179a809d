"""What a person sees of a run: a live view on a terminal, plain lines otherwise."""

import sys
from collections.abc import Mapping
from typing import ClassVar

from mt_core.contracts import MetricSink
from mt_core.progress import format_duration
from mt_core.training.metrics import PlainLines


def screen(steps: int) -> MetricSink:
    """The sink for this process's stdout."""
    return LiveView(steps) if sys.stdout.isatty() else PlainLines(steps)


class LiveView:
    """A progress bar with loss, learning rate, speed and time left, redrawn at each logged step."""

    name: ClassVar[str] = "live"

    def __init__(self, steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("valid {task.fields[valid]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TextColumn("{task.fields[left]} left"),
        )
        self.task = self.progress.add_task("training", total=steps, loss="-", valid="-", speed="-", left="-")
        self.progress.start()

    def write(self, metrics: Mapping[str, float | int | str]) -> None:
        """Redraw with a new line of metrics."""
        step = int(metrics["step"])
        if "valid_loss" in metrics:
            self.progress.update(self.task, completed=step, valid=f"{metrics['valid_loss']:.4f}")
        if "loss" not in metrics:
            return
        speed, left = f"{metrics['tokens_per_s']:,.0f}", format_duration(float(metrics["eta_s"]))
        self.progress.update(self.task, completed=step, loss=f"{metrics['loss']:.4f}", speed=speed, left=left)

    def close(self) -> None:
        """Leave the last state on the screen."""
        self.progress.stop()
