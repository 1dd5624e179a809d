"""How a job is doing, while it runs: a bar with MB/s, tokens/s, documents and the time left, or plain lines."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mt_core.progress import progress
from mt_data.preprocess.report import Report


@contextmanager
def watch(report: Report, total_bytes: int, log_interval: int | None) -> Iterator[Callable[[], None]]:
    """Yield a function to call after every change of the report.

    Without `log_interval` there is a bar on a terminal, or a line every ten seconds; with it, a line every so many
    documents. Compressed input counts by its bytes on the disk.
    """
    start, tokens, documents = time.monotonic(), report.all_tokens, report.documents
    done = report.disk_bytes

    def figures() -> str:
        seconds = max(time.monotonic() - start, 1e-9)
        return (
            f"{report.documents:,} documents, {(report.documents - documents) / seconds:,.0f}/s, "
            f"{(report.all_tokens - tokens) / seconds:,.0f} tokens/s"
        )

    if log_interval:
        yield _lines(report, log_interval, figures)
        return
    with progress("preprocess", total_bytes, "B", done=done) as advance:

        def show() -> None:
            nonlocal done
            advance(report.disk_bytes - done, figures())
            done = report.disk_bytes

        yield show


def _lines(report: Report, interval: int, figures: Callable[[], str]) -> Callable[[], None]:
    start, done, due = time.monotonic(), report.bytes, report.documents // interval + 1

    def show() -> None:
        nonlocal due
        if report.documents >= due * interval:
            due = report.documents // interval + 1
            rate = (report.bytes - done) / 1e6 / max(time.monotonic() - start, 1e-9)
            print(f"preprocess: {figures()}, {rate:.1f} MB/s", file=sys.stderr, flush=True)

    return show
