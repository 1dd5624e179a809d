"""`mt data merge`: several `.bin`/`.idx` pairs to one, as Megatron's `add_index` joins them.

Source: docs/specs/data.md §1.4, §1.7.

Tokens are copied as they are, lengths follow one another, document bounds are shifted.
"""

import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from glob import glob, has_magic
from pathlib import Path

import numpy as np

from mt_core.errors import MtError, Problem, raise_if
from mt_core.files import TEMPORARY, disk_errors, sync_directory
from mt_core.progress import progress
from mt_data.config.paths import find_missing_files
from mt_data.indexed.format import read_header
from mt_data.indexed.reader import IndexedReader
from mt_data.indexed.writer import IndexContents, write_index

BLOCK_ENTRIES = 1 << 20
COPY_BYTES = 16 << 20
SHARD = re.compile(r"_(\d+)-of-(\d+)_")
"""What `mt data preprocess --shard` puts into a name."""


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What the new pair holds."""

    pairs: int
    documents: int
    sequences: int
    tokens: int


def merge_pairs(prefixes: Sequence[str], output_prefix: str, *, multimodal: bool = False) -> MergeResult:
    """Write the pairs at `prefixes`, in this order, as one; it appears whole or not at all.

    Refused, all at once: other token types than the first, a pair whose halves disagree, sentences of different
    splitters, and the output among the inputs.
    """
    assert prefixes, "something to merge"
    readers = _open_readers(prefixes, output_prefix, multimodal)
    bin, idx, record = (Path(f"{output_prefix}.{suffix}") for suffix in ("bin", "idx", "json"))
    temporary = [path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}") for path in (bin, idx)]
    with disk_errors(bin):
        try:
            bin.parent.mkdir(parents=True, exist_ok=True)
            _copy_tokens(readers, temporary[0])
            with temporary[1].open("wb") as file:
                write_index(file, _describe_index(readers, multimodal))
                os.fsync(file.fileno())
            idx.unlink(missing_ok=True)
            temporary[0].replace(bin)
            if records := _read_splitting_records(prefixes):
                record.write_text(next(iter(records)), "utf-8")
            temporary[1].replace(idx)
            sync_directory(bin.parent)
        finally:
            for path in temporary:
                path.unlink(missing_ok=True)
    return MergeResult(
        len(readers),
        sum(reader.document_count for reader in readers),
        sum(map(len, readers)),
        sum(reader.token_count for reader in readers),
    )


def _open_readers(prefixes: Sequence[str], output_prefix: str, multimodal: bool) -> list[IndexedReader]:
    readers, problems = [], []
    for prefix in prefixes:
        try:
            readers.append(IndexedReader(prefix))
        except MtError as err:
            problems += err.problems
    problems += [
        Problem(
            str(r.idx_path), f"holds {r.dtype.name}, {readers[0].idx_path} {readers[0].dtype.name}", "one token type"
        )
        for r in readers[1:]
        if r.dtype != readers[0].dtype
    ]
    if multimodal:
        problems += [
            Problem(str(r.idx_path), "has no modes", "merge it without --multimodal")
            for r in readers
            if not _has_modes(r)
        ]
    if any(Path(prefix).resolve() == Path(output_prefix).resolve() for prefix in prefixes):
        problems.append(Problem(output_prefix, "is one of the inputs", "choose another --output-prefix"))
    if len(_read_splitting_records(prefixes)) > 1:
        problems.append(
            Problem(output_prefix, "sentences of its parts were split in different ways", "split them again")
        )
    raise_if(problems)
    return readers


def _read_splitting_records(prefixes: Sequence[str]) -> set[str]:
    paths = [Path(f"{prefix}.json") for prefix in prefixes if prefix.endswith("_sentence")]
    return {path.read_text("utf-8") for path in paths if path.is_file()}


def _copy_tokens(readers: Sequence[IndexedReader], path: Path) -> None:
    total = sum(reader.bin_path.stat().st_size for reader in readers)
    with path.open("wb") as target, progress("merge", total, "B") as advance:
        for reader in readers:
            with reader.bin_path.open("rb") as source:
                shutil.copyfileobj(source, target, COPY_BYTES)
            advance(reader.bin_path.stat().st_size)
        target.flush()
        os.fsync(target.fileno())


def _describe_index(readers: Sequence[IndexedReader], multimodal: bool) -> IndexContents:
    return IndexContents(
        readers[0].dtype,
        sum(map(len, readers)),
        sum(reader.document_count for reader in readers),
        partial(_read_lengths, readers),
        partial(_read_sequence_counts, readers),
        partial(_read_modes, readers) if multimodal else None,
    )


def _read_lengths(readers: Sequence[IndexedReader]) -> Iterator[np.ndarray]:
    for reader in readers:
        for start in range(0, len(reader), BLOCK_ENTRIES):
            yield reader.lengths[start : start + BLOCK_ENTRIES]


def _read_sequence_counts(readers: Sequence[IndexedReader]) -> Iterator[np.ndarray]:
    for reader in readers:
        for start in range(0, reader.document_count, BLOCK_ENTRIES):
            yield np.diff(reader.documents[start : start + BLOCK_ENTRIES + 1])


def _has_modes(reader: IndexedReader) -> bool:
    return reader.idx_path.stat().st_size == read_header(reader.idx_path).size + len(reader)


def _read_modes(readers: Sequence[IndexedReader]) -> Iterator[np.ndarray]:
    """The byte that each sequence has after the document bounds."""
    for reader in readers:
        if len(reader):
            yield np.memmap(reader.idx_path, np.int8, "r", offset=read_header(reader.idx_path).size)


def find_pairs(inputs: Sequence[str]) -> list[str]:
    """Prefixes of the pairs: those of a directory or a glob in sorted order, others as they are given.

    Every file of a directory must be half of a pair, or the record of a splitter beside one, and all parts of a job
    must be there.
    """
    prefixes, problems = [], []
    for name in inputs:
        try:
            prefixes += _expand_name(name)
        except MtError as err:
            problems += err.problems
    problems += [problem for prefix in prefixes for problem in find_missing_files(prefix, prefix)]
    raise_if([*problems, *_find_missing_shards(prefixes)])
    return prefixes


def _expand_name(name: str) -> list[str]:
    if Path(name).is_dir():
        return _list_pairs(Path(name))
    if has_magic(name) and not Path(f"{name}.idx").exists():
        stem = name.removesuffix(".idx").removesuffix(".bin")
        if not (prefixes := sorted(path[:-4] for path in glob(f"{stem}.idx"))):
            raise MtError(name, "matches no .idx file", "quote it if the shell should leave it alone")
        return prefixes
    return [name.removesuffix(".idx").removesuffix(".bin")]


def _list_pairs(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    pairs = {name[:-4] for name in names if name.endswith((".bin", ".idx"))}
    strays = [name for name in names if not (name.endswith((".bin", ".idx")) or _is_record(name, pairs))]
    raise_if(Problem(str(folder / name), "is neither a .bin nor an .idx", "move it out of the way") for name in strays)
    if not pairs:
        raise MtError(str(folder), "holds no .bin/.idx pair", "mt data preprocess writes them")
    return [str(folder / name) for name in sorted(pairs)]


def _is_record(name: str, pairs: set[str]) -> bool:
    return name.endswith("_sentence.json") and name[:-5] in pairs


def _find_missing_shards(prefixes: Sequence[str]) -> Iterator[Problem]:
    jobs: dict[tuple[str, str, int], set[int]] = defaultdict(set)
    for prefix in prefixes:
        for match in list(SHARD.finditer(Path(prefix).name))[-1:]:
            begin = prefix[: len(prefix) - len(Path(prefix).name) + match.start()]
            jobs[begin, Path(prefix).name[match.end() :], int(match[2])].add(int(match[1]))
    for (begin, end, parts), present in jobs.items():
        if missing := sorted(set(range(parts)) - present):
            names = ", ".join(f"{part}/{parts}" for part in missing)
            hint = "run mt data preprocess --shard for each of them"
            yield Problem(f"{begin}_*-of-{parts}_{end}", f"parts {names} are missing", hint)
