"""What a person sees of a run: a live view on a terminal, plain lines otherwise."""

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from typing import ClassVar

from mt_core.contracts import MetricSink
from mt_core.progress import format_duration, hide_control_characters
from mt_core.training.metrics import PlainLines, format_metrics


def screen(steps: int) -> MetricSink:
    """The sink for this process's stdout."""
    return LiveView(steps) if sys.stdout.isatty() else PlainLines(steps)


class LiveView:
    """The lines of the log, and below them a bar with loss, speed and time left that is redrawn at each logged step.

    What others print on stdout and stderr meanwhile goes above the bar, and Ctrl-C leaves no mark in it.
    """

    name: ClassVar[str] = "live"

    def __init__(self, steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.steps, self._stack = steps, ExitStack()
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
        self._stack.enter_context(hide_control_characters())
        self._stack.enter_context(self.progress)

    def write(self, metrics: Mapping[str, float | int | str]) -> None:
        """Print a new line of metrics above the bar, and redraw it."""
        for line in format_metrics(metrics, self.steps):
            self.progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
        step = int(metrics["step"])
        if "valid_loss" in metrics:
            self.progress.update(self.task, completed=step, valid=f"{metrics['valid_loss']:.4f}")
        if "loss" not in metrics:
            return
        speed, left = f"{metrics['tokens_per_s']:,.0f}", format_duration(float(metrics["eta_s"]))
        self.progress.update(self.task, completed=step, loss=f"{metrics['loss']:.4f}", speed=speed, left=left)

    def close(self) -> None:
        """Leave the last state on the screen, and the terminal as it was."""
        self._stack.close()
