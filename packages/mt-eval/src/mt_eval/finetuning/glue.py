"""Files of GLUE's tasks, MNLI and QQP among them: tab-separated lines in which a quote is a character like any other.

Columns are found by the names in a file's first line. Source: docs/specs/evaluation.md §3.4.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mt_core.errors import Problem, suggest_file
from mt_eval.finetuning.examples import UNLABELLED, Example, clean_text


@dataclass(frozen=True, slots=True)
class Layout:
    """What the files of a task look like."""

    texts: tuple[str, ...]
    """Columns of the text, or of both."""
    labels: Mapping[str, int]
    """Each class as files spell it, and its number."""
    label: str = "label"
    """Column of the class; a file without it has no labels."""
    uid: tuple[str, ...] = ("index",)
    """Columns of what names an example; without them the line's number does."""
    headerless: tuple[str, ...] = ()
    """Columns of files without a line of names."""
    scale: tuple[float, float] | None = None
    """Lowest and highest label of a task whose labels are numbers."""


YES_NO = {"0": 0, "1": 1}
ENTAILED = {"entailment": 0, "not_entailment": 1}
PAIR = ("sentence1", "sentence2")
LAYOUTS: Mapping[str, Layout] = {
    "cola": Layout(("sentence",), YES_NO, headerless=("source", "label", "mark", "sentence")),
    "mnli": Layout(PAIR, {"contradiction": 0, "entailment": 1, "neutral": 2}, "gold_label"),
    "mrpc": Layout(("#1 String", "#2 String"), YES_NO, "Quality", ("#1 ID", "#2 ID")),
    "qnli": Layout(("question", "sentence"), ENTAILED),
    "qqp": Layout(("question1", "question2"), YES_NO, "is_duplicate", ("id",)),
    "rte": Layout(PAIR, ENTAILED),
    "sst-2": Layout(("sentence",), YES_NO),
    "sts-b": Layout(PAIR, {}, "score", scale=(0.0, 5.0)),
    "wnli": Layout(PAIR, YES_NO),
}
"""By the name of the task."""


def list_classes(task: str) -> list[str]:
    """The classes of a task, in the order of their numbers; none of a task whose labels are numbers."""
    labels = LAYOUTS[task].labels
    return sorted(labels, key=labels.__getitem__)


def read_file(path: Path, task: str, *, labelled: bool) -> Iterator[Example | Problem]:
    """Each example, or what is wrong with its line; if `labelled`, a file without labels is a problem."""
    layout = LAYOUTS[task]
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as err:
        yield Problem(str(path), f"cannot be read ({err.strerror})", suggest_file(path))
        return
    except UnicodeDecodeError as err:
        line = err.object[: err.start].count(b"\n") + 1
        yield Problem(f"{path}:{line}", f"byte {err.object[err.start]:#04x} is not UTF-8", "convert the file")
        return
    rows = [(number, line.removesuffix("\r").split("\t")) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        yield Problem(str(path), "is empty", f"lines of {', '.join(layout.texts)} and {layout.label}")
        return
    header, rows = _split_header(rows, layout)
    if missing := [name for name in (*layout.texts, *([layout.label] if labelled else [])) if name not in header]:
        actual = f"has no column {', '.join(map(repr, missing))}, only {', '.join(header)}"
        yield Problem(f"{path}:1", actual, f"a first line with the names of {task}'s columns, tabs between them")
        return
    if not rows:
        yield Problem(str(path), "has no line after the names of its columns", "at least one example")
    for number, row in rows:
        yield _read_row(f"{path}:{number}", number, dict(zip(header, row, strict=False)), len(row), header, layout)


def _split_header(
    rows: list[tuple[int, list[str]]], layout: Layout
) -> tuple[Sequence[str], list[tuple[int, list[str]]]]:
    """Names of the columns, and the lines that have examples."""
    first = rows[0][1]
    if layout.headerless and not {*layout.texts} & {*first}:
        return layout.headerless, rows
    return first, rows[1:]


def _read_row(
    where: str, number: int, row: Mapping[str, str], columns: int, header: Sequence[str], layout: Layout
) -> Example | Problem:
    if columns != len(header):
        return Problem(
            where, f"{columns} columns, others have {len(header)}", "a tab between columns, and none in them"
        )
    texts = [clean_text(row[name]) for name in layout.texts]
    if empty := [name for name, text in zip(layout.texts, texts, strict=True) if not text]:
        return Problem(where, f"{', '.join(empty)} is empty", "a text")
    given = row.get(layout.label)
    label = UNLABELLED if given is None else _read_label(given, layout)
    if label is None:
        allowed = f"a number from {layout.scale[0]:g} to {layout.scale[1]:g}" if layout.scale else ""
        return Problem(where, f"label {given!r}", allowed or f"allowed: {', '.join(layout.labels)}")
    uid = "-".join(row[name] for name in layout.uid) if {*layout.uid} <= row.keys() else str(number)
    pair = (texts[0], texts[1] if len(texts) > 1 else None)
    return Example(uid, (pair,), label)


def _read_label(given: str, layout: Layout) -> float | None:
    """The class's number, or the number itself; None if it is none of the task's."""
    if layout.scale is None:
        return layout.labels.get(given)
    try:
        label = float(given)
    except ValueError:
        return None
    return label if layout.scale[0] <= label <= layout.scale[1] else None
