"""Records, one JSON object a line, in the order of the input files: reading them, changing them, giving each an id."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mt_core.errors import MtError
from mt_data.corpus.step import CorpusStep, StepOutput, run_step
from mt_data.text_io.json_documents import BadLine, check_texts, parse_object
from mt_data.text_io.lines import LineChunk, check_inputs, read_chunks

OnError = Literal["stop", "skip"]
Record = dict[str, Any]
ID_KEY = "adlr_id"
"""Megatron's name for it."""


@dataclass(frozen=True, slots=True)
class LocatedLines:
    """Consecutive lines of a file, and where they stand."""

    chunk: LineChunk
    document: int
    """Lines before the first of them, over all files."""
    offset: int
    """Bytes before it in its file."""
    file: int
    """Number of the file."""


def read_lines(paths: Sequence[Path]) -> Iterator[LocatedLines]:
    """The lines of all files, in chunks; the same each time."""
    document = 0
    for number, path in enumerate(paths):
        offset = 0
        for chunk in read_chunks(path):
            yield LocatedLines(chunk, document, offset, number)
            document += len(chunk.lines)
            offset += sum(map(len, chunk.lines)) + len(chunk.lines)


@dataclass(frozen=True, slots=True)
class RecordTransform:
    """A function over records as one over lines, for `run_step`; bad lines stop it or are counted.

    `transform(record, number)` gives the records that replace one, and the name under which to count what happened;
    `keys` are those that every record must have a text under.
    """

    transform: Callable[[Record, int], tuple[Sequence[Record], str]]
    keys: tuple[str, ...]
    on_error: OnError = "stop"

    def __call__(self, lines: LocatedLines) -> StepOutput:
        """The records of some lines."""
        produced = StepOutput()
        out: list[Record] = []
        for index, line in enumerate(lines.chunk.lines):
            where = f"{lines.chunk.path}:{lines.chunk.first + index}"
            record = read_record(line, self.keys, where, self.on_error)
            records, outcome = ([], "bad lines") if record is None else self.transform(record, lines.document + index)
            produced.counts["records"] += 1
            produced.counts[outcome] += 1
            produced.counts["written"] += len(records)
            out += records
        produced.data = b"".join(map(to_line, out))
        return produced


def read_record(line: bytes, keys: Sequence[str], where: str, on_error: OnError = "stop") -> Record | None:
    """The object of a line, checked to have its texts; None if it is bad and errors are skipped."""
    try:
        record = parse_object(line)
        check_texts(record, keys)
    except BadLine as err:
        if on_error == "skip":
            return None
        raise MtError(where, str(err), "one JSON object a line; --on-error skip leaves such lines out") from None
    return record


def to_line(record: Record | Sequence[str]) -> bytes:
    """A record, or a list of names, as a line of UTF-8; characters are written as they are, halves of them escaped."""
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(record).encode() + b"\n"


def add_ids(
    inputs: Sequence[Path], output: Path, prefix: str, *, key: str = ID_KEY, on_error: OnError = "stop"
) -> dict[str, int]:
    """Give each record `PREFIX-0000000001` and so on, by its line."""
    check_inputs(inputs)
    step = CorpusStep("add-id", output, tuple(inputs), {"prefix": prefix, "key": key, "on_error": on_error})
    return run_step(step, read_lines(inputs), RecordTransform(partial(_add_id, key, prefix), (), on_error))


def _add_id(key: str, prefix: str, record: Record, number: int) -> tuple[list[Record], str]:
    return [{**record, key: f"{prefix}-{number + 1:010d}"}], "kept"
