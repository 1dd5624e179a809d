"""The whole job: texts in, one `.bin`/`.idx` pair for each key out, and a report.

Workers tokenize pieces of a megabyte; this process appends what they send, in order, and after every `shard_bytes` of
text puts it all on the disk and a mark into the journal. The output does not depend on the workers, nor on where a run
was stopped and taken up again.
"""

import json
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from mt_core.errors import MtError, raise_if
from mt_core.files import atomic_file, disk_errors, sync_directory
from mt_data.indexed.format import choose_token_dtype
from mt_data.preprocess.chunking import InputPosition, count_input_bytes, cut_pieces
from mt_data.preprocess.encoding import EncodedPiece, encode_piece, get_tokenizer
from mt_data.preprocess.job import Engine, PreprocessJob, find_option_conflicts, make_job_key
from mt_data.preprocess.journal import Journal, JournalMark
from mt_data.preprocess.output import OutputFiles
from mt_data.preprocess.report import PreprocessReport, show_progress
from mt_data.text_io.inputs import InputFile, find_inputs
from mt_data.text_io.ordered_map import ordered_map
from mt_data.text_io.ray_map import ray_map

ENGINES: dict[Engine, Callable[..., Generator[Any, None, None]]] = {"local": ordered_map, "ray": ray_map}


def preprocess(job: PreprocessJob) -> PreprocessReport:
    """Run a job, or the rest of it. The pairs of all keys appear together at the end, each whole or not at all."""
    raise_if(find_option_conflicts(job))
    files = find_inputs(job.inputs, job.input_format)
    tokenizer = get_tokenizer(job.encoding)  # built here first: a mistake shows before any work
    dtype = choose_token_dtype(tokenizer.vocab_size)
    if job.encoding.append_eod:
        _ = tokenizer.eod  # refused if it has none
    start = time.monotonic()
    with _keep_or_remove(Journal(job.shard_prefix)) as journal:
        parts = {
            key: OutputFiles(journal.folder, f"{number}", dtype, partitions=job.partitions)
            for number, key in enumerate(job.encoding.keys)
        }
        mark = _resume(job, journal, make_job_key(job, files), parts)
        report = PreprocessReport.from_json(mark.report) if mark.report else PreprocessReport()
        if not mark.finished:
            with ExitStack() as stack:
                for part in parts.values():
                    stack.callback(part.close)
                    part.open(mark.sizes)
                mark = _tokenize_pieces(job, files, journal, parts, mark.position, report)
            for part in parts.values():
                part.seal()
            journal.mark(JournalMark(mark.position, mark.sizes, report.as_json(), finished=True))
        _publish_pairs(job, parts)
        journal.remove()
    report.seconds = time.monotonic() - start
    return report


@contextmanager
def _keep_or_remove(journal: Journal) -> Iterator[Journal]:
    """After an error or an interrupt, leave for the next run what it can use, and nothing else."""
    try:
        yield journal
    except BaseException:
        if journal.marked:
            print(f"{journal.folder}: keeps what is done; the same command goes on from there", file=sys.stderr)
        elif journal.is_locked:
            journal.remove()
        else:
            journal.remove_empty()
        raise
    finally:
        journal.close()


def _resume(job: PreprocessJob, journal: Journal, key: dict[str, Any], parts: dict[str, OutputFiles]) -> JournalMark:
    """Where an earlier run of the same job came to, or the beginning."""
    mark = journal.open(key)
    if mark and not mark.finished and not all(part.fits(mark.sizes) for part in parts.values()):
        journal.discard_note("damaged: its files are shorter than its journal says")
        mark = None
    if mark and mark.report["skipped"] and job.on_error == "stop":
        journal.discard_note("one that skipped lines, and this one is to stop at the first")
        mark = None
    if mark:
        documents, done = mark.report["documents"], mark.report["bytes"] / 1e6
        print(f"{journal.folder}: goes on after {documents:,} documents, {done:,.0f} MB", file=sys.stderr)
        return mark
    journal.begin(key)
    return JournalMark()


def _tokenize_pieces(
    job: PreprocessJob,
    files: list[InputFile],
    journal: Journal,
    parts: dict[str, OutputFiles],
    start: InputPosition,
    report: PreprocessReport,
) -> JournalMark:
    """Tokenize everything from a position on, with a mark after every shard; the mark of all of it is not written."""
    results = ENGINES[job.engine](
        partial(encode_piece, job.encoding, job.cut), cut_pieces(files, job.cut, start), workers=job.workers
    )
    committed = report.bytes
    with closing(results) as pieces, show_progress(report, count_input_bytes(files, job.cut), job.log_interval) as show:
        for piece in pieces:
            _append_piece(job, parts, piece, report)
            show()
            if report.bytes - committed >= job.shard_bytes:
                journal.mark(JournalMark(piece.after, _commit_files(parts), report.as_json()))
                committed = report.bytes
    return JournalMark(InputPosition(len(files)), _commit_files(parts), report.as_json())


def _append_piece(
    job: PreprocessJob, parts: dict[str, OutputFiles], piece: EncodedPiece, report: PreprocessReport
) -> None:
    if piece.problems and job.on_error == "stop":
        raise MtError.from_problems(piece.problems[:1])
    for key, encoded in piece.keys.items():
        parts[key].add(encoded, report.documents)
    report.count(piece)


def _commit_files(parts: dict[str, OutputFiles]) -> dict[str, int]:
    return {name: size for part in parts.values() for name, size in part.commit().items()}


def _publish_pairs(job: PreprocessJob, parts: dict[str, OutputFiles]) -> None:
    """Give the files their names. A run that was stopped in the middle of this finds the rest to be done.

    An older pair of the same name is removed first, so that the two never mix.
    """
    for key, part in parts.items():
        bin, idx, record = (Path(f"{job.prefix(key)}.{suffix}") for suffix in ("bin", "idx", "json"))
        with disk_errors(idx):
            if part.sealed_bin.exists():
                idx.unlink(missing_ok=True)
                part.sealed_bin.replace(bin)
            if job.encoding.splitting:
                with atomic_file(record, "w") as file:
                    file.write(json.dumps(asdict(job.encoding.splitting), indent=2) + "\n")
            if part.sealed_idx.exists():
                part.sealed_idx.replace(idx)
            sync_directory(idx.parent)
