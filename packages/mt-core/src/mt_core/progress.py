"""One progress bar for every long loop: rich on a terminal, plain lines on stderr otherwise."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PLAIN_INTERVAL_S = 10.0


@contextmanager
def progress(label: str, total: int | None = None, unit: str = "") -> Iterator[Callable[[int], None]]:
    """Yield `advance(n)`. Draws a bar on a terminal; else prints a line every ten seconds, and none for less."""
    with _bar(label, total, unit) if sys.stderr.isatty() else _lines(label, total, unit) as advance:
        yield advance


@contextmanager
def _bar(label: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError:  # rich comes with mt-cli; a library user may not have it
        with _lines(label, total, unit) as advance:
            yield advance
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=total)
        yield lambda n: bars.advance(task, n)


@contextmanager
def _lines(label: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    done, start = 0, time.monotonic()
    due = start + PLAIN_INTERVAL_S

    def advance(n: int) -> None:
        nonlocal done, due
        done += n
        if (now := time.monotonic()) >= due:
            due = now + PLAIN_INTERVAL_S
            of = f"/{total}" if total else ""
            print(f"{label}: {done}{of} {unit} ({done / (now - start):.1f}/s)", file=sys.stderr, flush=True)

    yield advance
