"""One progress bar for every long loop: rich on a terminal, plain lines on stderr otherwise."""

import sys
import termios
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol

PLAIN_INTERVAL_S = 10.0
LOCAL_MODES = 3
"""Place of the local modes among a terminal's attributes."""
ECHOCTL = getattr(termios, "ECHOCTL", 0)
BYTES = "B"
"""The unit that is shown in MB and MB/s."""


class Advance(Protocol):
    """Says that some more is done."""

    def __call__(self, n: int, note: str = "", /) -> None:
        """`n` more units; `note` is shown beside the bar until the next one."""
        ...


@contextmanager
def progress(label: str, total: int | None = None, unit: str = "", *, done: int = 0) -> Iterator[Advance]:
    """Yield `advance(n)`. Draws a bar on a terminal; else prints a line every ten seconds, and none for less.

    `done` units of `total` were done before, by an earlier run.
    """
    with _chosen(label, total, unit, done) as advance:
        yield advance


def _chosen(label: str, total: int | None, unit: str, done: int) -> AbstractContextManager[Advance]:
    if not sys.stderr.isatty():
        return _lines(label, total, unit, done)
    try:
        import rich.progress  # noqa: F401
    except ModuleNotFoundError:  # rich comes with mt-cli; a library user may not have it
        return _lines(label, total, unit, done)
    return _bar(label, total, unit, done)


@contextmanager
def _bar(label: str, total: int | None, unit: str, done: int) -> Iterator[Advance]:
    from rich import progress as rich
    from rich.console import Console

    amount = (rich.DownloadColumn(), rich.TransferSpeedColumn()) if unit == BYTES else (rich.MofNCompleteColumn(), unit)
    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), *amount, rich.TimeRemainingColumn())
    console = Console(stderr=True)
    bars = rich.Progress(*columns, rich.TextColumn("{task.fields[note]}"), console=console, transient=True)
    with hide_control_characters(), bars:
        task = bars.add_task(label, total=total, completed=done, note="")
        yield lambda n, note="", /: bars.update(task, advance=n, note=note)


@contextmanager
def hide_control_characters() -> Iterator[None]:
    """While a bar is drawn, the terminal does not echo Ctrl-C as ^C, which would move the bar to a second line."""
    try:
        handle = sys.stdin.fileno()
        before = termios.tcgetattr(handle)
    except (OSError, ValueError, AttributeError, termios.error):  # no terminal, closed, or replaced
        yield
        return
    quiet = [*before]
    quiet[LOCAL_MODES] = before[LOCAL_MODES] & ~ECHOCTL
    termios.tcsetattr(handle, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        with suppress(termios.error):  # the terminal may be gone
            termios.tcsetattr(handle, termios.TCSANOW, before)


@contextmanager
def _lines(label: str, total: int | None, unit: str, done: int) -> Iterator[Advance]:
    now, start = done, time.monotonic()
    due = start + PLAIN_INTERVAL_S
    scale, name = (10**6, "MB") if unit == BYTES else (1, unit)

    def advance(n: int, note: str = "", /) -> None:
        nonlocal now, due
        now += n
        if (at := time.monotonic()) >= due:
            due = at + PLAIN_INTERVAL_S
            rate = (now - done) / (at - start)
            of = f"/{total // scale}" if total else ""
            left = f", {format_duration((total - now) / rate)} left" if total and rate else ""
            tail = f", {note}" if note else ""
            print(f"{label}: {now // scale}{of} {name} ({rate / scale:.1f}/s{left}){tail}", file=sys.stderr, flush=True)

    yield advance


def format_duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    hours, minutes = divmod(round(seconds) // 60, 60)
    return f"{hours}:{minutes:02}:{round(seconds) % 60:02}"
