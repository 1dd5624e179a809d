"""One step of the pipeline: items in, one file out, resumable at the item, with a report beside the result.

While a step works, `OUTPUT.part` grows and `OUTPUT.journal` says how much of it is good and how many items it stands
for; a run that is killed goes on from there. When it is done, the part takes the name `OUTPUT` and `OUTPUT.report.json`
says from what it was made; the same step over the same inputs is then not run again.
"""

import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, TypeVar

from mt_core.errors import MtError
from mt_core.files import atomic_file, disk_errors, sync_directory
from mt_core.progress import progress
from mt_data.text_io.ordered_map import ordered_map

Item = TypeVar("Item")

JOURNAL_INTERVAL_S = 2.0
VERSION = 1
"""Goes into the keys; to be raised when items are cut otherwise, as a journal counts them."""


@dataclass(frozen=True, slots=True)
class CorpusStep:
    """A step and everything that its result depends on."""

    name: str
    output: Path
    inputs: tuple[Path, ...]
    """Every file that it reads."""
    options: Mapping[str, object] = field(default_factory=dict)
    workers: int = 1

    @property
    def part(self) -> Path:
        """The unfinished output."""
        return self.output.with_name(f"{self.output.name}.part")

    @property
    def journal(self) -> Path:
        """How far the part goes."""
        return self.output.with_name(f"{self.output.name}.journal")

    @property
    def report(self) -> Path:
        """What was done, once it is."""
        return self.output.with_name(f"{self.output.name}.report.json")

    def key(self) -> str:
        """A hash of the options and of the inputs' names, sizes and times."""
        stats = [(str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in self.inputs]
        parts = (VERSION, self.name, stats, dict(self.options))
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


@dataclass(slots=True)
class StepOutput:
    """What one item adds to the output and to the report."""

    data: bytes = b""
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class StepState:
    """The content of a journal or a report."""

    key: str
    items: int = 0
    bytes: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)


def run_step(
    step: CorpusStep,
    items: Iterable[Item],
    produce: Callable[[Item], StepOutput],
    *,
    recall: Callable[[bytes], object] | None = None,
) -> dict[str, int]:
    """Run `produce` over the items, in order, and return the counts of all of them.

    The items must come in the same order every time. With several workers `produce` must be picklable. Where it
    remembers what it saw, `recall` gets every line of the output that a run which was stopped left, before it goes on.
    """
    key = step.key()
    done = _read_state(step.report, key)
    if done and step.output.exists() and step.output.stat().st_size == done.bytes:
        print(f"{step.name}: {step.output} is already made from these inputs", file=sys.stderr)
        return dict(done.counts)
    step.output.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(step.output):
        state = _read_journal(step, key)
        with step.part.open("r+b" if state.items else "w+b") as part:
            part.truncate(state.bytes)
            for line in part if recall else ():
                recall(line.removesuffix(b"\n"))  # pyright: ignore[reportOptionalCall] - there are no lines without
            part.seek(state.bytes)
            state = _process_items(step, part, state, islice(items, state.items, None), produce)
        step.report.unlink(missing_ok=True)
        step.part.replace(step.output)
        _write_state(step.report, state)
        step.journal.unlink(missing_ok=True)
        sync_directory(step.output.parent)
    return dict(state.counts)


def _process_items(
    step: CorpusStep, part: IO[bytes], state: StepState, items: Iterator[Item], produce: Callable[[Item], StepOutput]
) -> StepState:
    due = time.monotonic() + JOURNAL_INTERVAL_S
    results = ordered_map(produce, items, workers=step.workers)
    with closing(results) as produced, progress(step.name, unit="items") as advance:
        try:
            for result in produced:
                part.write(result.data)
                state = _add_output(state, result, part.tell())
                advance(1)
                if time.monotonic() >= due:
                    _commit(step, part, state)
                    due = time.monotonic() + JOURNAL_INTERVAL_S
        except BaseException:  # Ctrl-C and a bad line too: what is good so far is kept
            with suppress(OSError, MtError):
                _commit(step, part, state)
            raise
    _commit(step, part, state)
    return state


def _add_output(state: StepState, result: StepOutput, size: int) -> StepState:
    """The state with one item more, made in one piece: an interrupt finds either this or the one before."""
    counts = Counter(state.counts)
    counts.update(result.counts)
    return StepState(state.key, state.items + 1, size, counts)


def _commit(step: CorpusStep, part: IO[bytes], state: StepState) -> None:
    part.flush()
    os.fsync(part.fileno())
    _write_state(step.journal, state)


def _read_journal(step: CorpusStep, key: str) -> StepState:
    state = _read_state(step.journal, key)
    if state is None or not step.part.exists() or step.part.stat().st_size < state.bytes:
        return StepState(key)
    return state


def _read_state(path: Path, key: str) -> StepState | None:
    """The state in a file, if it belongs to the step of this key."""
    try:
        state = StepState(**json.loads(path.read_text("utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return state if state.key == key else None


def _write_state(path: Path, state: StepState) -> None:
    values = {"key": state.key, "items": state.items, "bytes": state.bytes, "counts": dict(state.counts)}
    with atomic_file(path, "w") as file:
        file.write(json.dumps(values, indent=2) + "\n")
