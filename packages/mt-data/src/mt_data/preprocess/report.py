"""What a job did, counted as it goes, and how it is doing while it runs: a bar, or plain lines."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from mt_core.errors import Problem
from mt_core.progress import progress
from mt_data.preprocess.encoding import EncodedPiece

EXAMPLES = 5
"""Skipped lines that the report names."""


@dataclass(slots=True)
class PreprocessReport:
    """What a job did so far, summed over its runs."""

    documents: int = 0
    """Lines that became documents, empty ones included."""
    skipped: int = 0
    """Lines that are not documents and were left out."""
    examples: list[Problem] = field(default_factory=list)
    """The first few skipped lines, with what is wrong with them."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Number of tokens of each key, end-of-document ids included."""
    sequences: dict[str, int] = field(default_factory=dict)
    """Number of sequences of each key."""
    empty: dict[str, int] = field(default_factory=dict)
    """Number of documents without a token, for each key."""
    bytes: int = 0
    """Size of the text, decompressed."""
    disk_bytes: int = 0
    """Size of the input on the disk."""
    resumed_bytes: int = 0
    """Part of `bytes` that an earlier run had done."""
    seconds: float = 0.0
    """Duration of this run."""

    def count(self, piece: EncodedPiece) -> None:
        """Add the counts of a piece."""
        for key, encoded in piece.keys.items():
            self.tokens[key] = self.tokens.get(key, 0) + len(encoded.tokens)
            self.sequences[key] = self.sequences.get(key, 0) + len(encoded.lengths)
            self.empty[key] = self.empty.get(key, 0) + int((encoded.sequences == 0).sum())
        self.documents += len(next(iter(piece.keys.values())).sequences)
        self.skipped += len(piece.problems)
        self.examples += piece.problems[: EXAMPLES - len(self.examples)]
        self.bytes += piece.bytes
        self.disk_bytes += piece.disk_bytes

    @property
    def all_tokens(self) -> int:
        """Tokens of all keys."""
        return sum(self.tokens.values())

    @property
    def megabytes_per_second(self) -> float:
        """Speed of this run, in megabytes of decompressed text."""
        return (self.bytes - self.resumed_bytes) / 1e6 / max(self.seconds, 1e-9)

    def as_json(self) -> dict[str, Any]:
        """Plain values; `from_json` takes them back."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The report that an earlier run left, its bytes counted as resumed."""
        problems = [Problem(**problem) for problem in values["examples"]]
        return cls(**{**values, "examples": problems, "resumed_bytes": values["bytes"], "seconds": 0.0})


@contextmanager
def show_progress(report: PreprocessReport, total_bytes: int, log_interval: int | None) -> Iterator[Callable[[], None]]:
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
        yield _print_lines(report, log_interval, figures)
        return
    with progress("preprocess", total_bytes, "B", done=done) as advance:

        def show() -> None:
            nonlocal done
            advance(report.disk_bytes - done, figures())
            done = report.disk_bytes

        yield show


def _print_lines(report: PreprocessReport, interval: int, figures: Callable[[], str]) -> Callable[[], None]:
    start, done, due = time.monotonic(), report.bytes, report.documents // interval + 1

    def show() -> None:
        nonlocal due
        if report.documents >= due * interval:
            due = report.documents // interval + 1
            rate = (report.bytes - done) / 1e6 / max(time.monotonic() - start, 1e-9)
            print(f"preprocess: {figures()}, {rate:.1f} MB/s", file=sys.stderr, flush=True)

    return show
