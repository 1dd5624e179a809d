"""Taking passages of evaluation sets out of a corpus: their 13-grams are counted, then cut out with their surroundings.

An n-gram that occurs often in the corpus is a common phrase, not a leak, and stays.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mt_core.errors import MtError
from mt_data.corpus.ngrams import NgramIndex, NgramSizes, PassageCut, cut_passages, list_ngrams
from mt_data.corpus.records import OnError, Record, RecordTransform, read_lines, read_record
from mt_data.corpus.step import CorpusStep, run_step
from mt_data.text_io.inputs import guess_format
from mt_data.text_io.lines import check_inputs

TaskNgrams = Mapping[str, tuple[str, ...]]
"""N-gram to the tasks that it comes from."""


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """An evaluation set: JSON lines with a text under `key`, or plain text with one on each line."""

    path: Path
    key: str = "text"

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.name.partition(".")[0]


@dataclass(frozen=True, slots=True)
class NgramFilter:
    """What is looked for and how it is cut."""

    key: str = "text"
    sizes: NgramSizes = field(default_factory=NgramSizes)
    cut: PassageCut = field(default_factory=PassageCut)
    often: int = 10
    """An n-gram that the corpus holds so often is a common phrase."""


def parse_evaluation_set(text: str) -> EvaluationSet:
    """`FILE` or `FILE:KEY`."""
    path, colon, key = text.rpartition(":")
    return EvaluationSet(Path(path), key) if colon and not Path(text).exists() else EvaluationSet(Path(text))


def filter_ngrams(
    inputs: Sequence[Path],
    output: Path,
    tasks: Sequence[EvaluationSet],
    filter: NgramFilter,
    *,
    on_error: OnError = "stop",
) -> dict[str, int]:
    """Write the pieces of the records that hold none of the tasks' n-grams, each with a `split_id`."""
    files = (*inputs, *(task.path for task in tasks))
    check_inputs(files)
    keys = read_ngrams(tasks, filter.sizes)
    options = {"filter": repr(filter), "tasks": repr(tasks), "on_error": on_error}
    counted = output.with_name(f"{output.name}.matches")
    each = RecordTransform(partial(_count_record, NgramIndex(keys, filter.sizes), filter.key), (filter.key,), on_error)
    run_step(CorpusStep("count n-grams", counted, files, options), read_lines(inputs), each)
    common = _common_ngrams(counted, filter.often)
    rare = {key: names for key, names in keys.items() if key not in common}
    each = RecordTransform(
        partial(_cut_record, NgramIndex(rare, filter.sizes), filter, _join_names(tasks)), (filter.key,), on_error
    )
    counts = run_step(CorpusStep("filter-ngrams", output, files, options), read_lines(inputs), each)
    return counts | {"n-grams": len(keys), "common n-grams": len(common)}


def read_ngrams(tasks: Sequence[EvaluationSet], sizes: NgramSizes) -> dict[str, tuple[str, ...]]:
    """The n-grams of all evaluation sets."""
    keys: dict[str, tuple[str, ...]] = {}
    for task in tasks:
        for lines in read_lines([task.path]):
            for number, line in enumerate(lines.chunk.lines):
                for key in list_ngrams(_read_text(task, line, f"{task.path}:{lines.chunk.first + number}"), sizes):
                    keys[key] = tuple(dict.fromkeys((*keys.get(key, ()), task.name)))
    if not keys:
        names = ", ".join(str(task.path) for task in tasks)
        raise MtError(names, f"no text of at least {sizes.shortest} words", "evaluation sets with longer texts")
    return keys


def _read_text(task: EvaluationSet, line: bytes, where: str) -> str:
    if guess_format(task.path) != "jsonl":
        return line.decode(errors="replace")
    record = read_record(line, (task.key,), where)
    assert record is not None
    return record[task.key]


def _count_record(index: NgramIndex, key: str, record: Record, number: int) -> tuple[list[Record], str]:
    matches = Counter(index.matches(record[key]))
    return ([dict(matches)], "with matches") if matches else ([], "without")


def _common_ngrams(counted: Path, often: int) -> set[str]:
    totals: Counter[str] = Counter()
    with counted.open("rb") as file:
        for line in file:
            totals.update(json.loads(line))
    return {key for key, count in totals.items() if count >= often}


def _join_names(tasks: Sequence[EvaluationSet]) -> str:
    return "-".join(dict.fromkeys(task.name for task in tasks))


def _cut_record(
    index: NgramIndex, filter: NgramFilter, label: str, record: Record, number: int
) -> tuple[list[Record], str]:
    kept, matches = cut_passages(record[filter.key], index, filter.cut)
    if len(kept) > filter.cut.most:
        return [], "dropped whole"
    before = f"{old}-" if (old := record.get("split_id")) else ""
    records = [
        {**record, filter.key: piece, "split_id": f"{before}{label}-{number + 1:010d}-{piece_number:04d}"}
        for piece_number, piece in enumerate(kept)
    ]
    return records, "untouched" if not matches else "cut" if kept else "nothing left"
