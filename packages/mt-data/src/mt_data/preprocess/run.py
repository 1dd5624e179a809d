"""The whole job: lines in, one `.bin`/`.idx` pair for each key out, and a report."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from mt_core.errors import MtError, Problem
from mt_core.progress import progress
from mt_data.indexed.format import token_dtype
from mt_data.indexed.writer import IndexedWriter
from mt_data.preprocess.encode import EncodedChunk, Encoding, encode_chunk, tokenizer_of
from mt_data.preprocess.lines import COMPRESSED, Chunk, check_inputs, read_chunks
from mt_data.preprocess.ordered_map import ordered_map

OnError = Literal["stop", "skip"]
EXAMPLES = 5
"""Skipped lines that the report names."""


@dataclass(frozen=True, slots=True)
class Job:
    """What to preprocess, from where to where."""

    inputs: tuple[Path, ...]
    output_prefix: str
    encoding: Encoding
    workers: int = 1
    on_error: OnError = "stop"
    """At a line that is not a document: stop and write nothing, or leave the line out and count it."""

    def prefix(self, key: str) -> str:
        """Prefix of the pair that holds a key."""
        return f"{self.output_prefix}_{key}_document"


@dataclass(slots=True)
class Report:
    """What was done."""

    documents: int = 0
    """Lines that became documents, empty ones included."""
    skipped: int = 0
    """Lines that did not."""
    examples: list[Problem] = field(default_factory=list)
    """The first of them."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Of each key, end-of-document ids included."""
    empty: dict[str, int] = field(default_factory=dict)
    """Of each key, documents without a token."""
    bytes: int = 0
    """Of the lines, uncompressed."""
    seconds: float = 0.0


def preprocess(job: Job) -> Report:
    """Run a job. The pairs of all keys appear together at the end; whatever stops it leaves none of them."""
    check_inputs(job.inputs)
    keys = job.encoding.keys
    if len(set(keys)) < len(keys):
        raise MtError("--json-keys", f"names a key twice: {' '.join(keys)}", "each key once")
    dtype = token_dtype(tokenizer_of(job.encoding).vocab_size)  # built here first: a mistake shows before any work
    report = Report(tokens=dict.fromkeys(keys, 0), empty=dict.fromkeys(keys, 0))
    start = time.monotonic()
    with ExitStack() as stack:
        writers = {}
        for key in keys:
            writers[key] = IndexedWriter(job.prefix(key), dtype)
            stack.callback(writers[key].abort)
        _write_all(job, writers, report)
        for writer in writers.values():
            writer.close()
        for writer in writers.values():
            writer.finish()
    report.seconds = time.monotonic() - start
    return report


def _write_all(job: Job, writers: dict[str, IndexedWriter], report: Report) -> None:
    plain = all(path.suffix not in COMPRESSED for path in job.inputs)
    total = sum(path.stat().st_size for path in job.inputs) // 1000 if plain else None
    results = ordered_map(partial(encode_chunk, job.encoding), _chunks(job.inputs), workers=job.workers)
    with closing(results) as encoded, progress("preprocess", total, "kB") as advance:
        for chunk in encoded:
            if chunk.problems and job.on_error == "stop":
                raise MtError.of(chunk.problems[:1])
            for key, writer in writers.items():
                writer.add_documents(chunk.tokens[key], chunk.lengths[key])
            before = report.bytes // 1000
            _count(report, chunk)
            advance(report.bytes // 1000 - before)


def _chunks(inputs: tuple[Path, ...]) -> Iterator[Chunk]:
    for path in inputs:
        yield from read_chunks(path)


def _count(report: Report, chunk: EncodedChunk) -> None:
    for key, lengths in chunk.lengths.items():
        report.tokens[key] += len(chunk.tokens[key])
        report.empty[key] += int((lengths == 0).sum())
    report.documents += len(next(iter(chunk.lengths.values())))
    report.skipped += len(chunk.problems)
    report.examples += chunk.problems[: EXAMPLES - len(report.examples)]
    report.bytes += chunk.bytes
