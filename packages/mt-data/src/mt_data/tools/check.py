"""Checking a `.bin`/`.idx` pair from end to end, in constant memory, and reporting everything that is wrong at once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mt_core.errors import MtError, Problem
from mt_core.progress import progress
from mt_data.config.paths import find_missing_files
from mt_data.indexed.format import DOCUMENT, LENGTH, POINTER, Header, read_header

BLOCK_ENTRIES = 1 << 20
BLOCK_TOKENS = 1 << 23
REDO = "preprocess it again"


@dataclass(frozen=True, slots=True)
class UncheckedIndex:
    """The arrays of an `.idx` file, unchecked."""

    idx_path: Path
    bin_path: Path
    header: Header
    lengths: np.ndarray
    pointers: np.ndarray
    documents: np.ndarray


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What a check found."""

    problems: tuple[Problem, ...]
    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    largest: int | None = None
    """Largest token id; None without tokens."""


def check_pair(prefix: str, *, vocab_size: int | None = None) -> CheckResult:
    """Every problem of the pair at `prefix`: its index always, token ids below 0 or outside a vocabulary too."""
    if problems := tuple(find_missing_files(prefix, prefix)):
        return CheckResult(problems)
    try:
        index = _open_index(prefix)
    except MtError as err:  # nothing behind a wrong header can be trusted
        return CheckResult(err.problems)
    problems = list(_structure_problems(index))
    extremes = _find_id_range(index)
    if vocab_size is not None and extremes and extremes[1] >= vocab_size:
        problems.append(
            _describe_id_problem(index, lambda ids: ids >= vocab_size, f"ids below {vocab_size}, the vocabulary")
        )
    if extremes and extremes[0] < 0:
        problems.append(_describe_id_problem(index, lambda ids: ids < 0, "ids of at least 0"))
    return CheckResult(
        tuple(problems),
        documents=max(0, len(index.documents) - 1),
        sequences=len(index.lengths),
        tokens=index.bin_path.stat().st_size // index.header.dtype.itemsize,
        largest=int(extremes[1]) if extremes else None,
    )


def _open_index(prefix: str) -> UncheckedIndex:
    idx_path, bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    header = read_header(idx_path)
    idx = np.memmap(idx_path, dtype=np.uint8, mode="r")
    return UncheckedIndex(
        idx_path,
        bin_path,
        header,
        lengths=idx[header.lengths_offset : header.pointers_offset].view(LENGTH),
        pointers=idx[header.pointers_offset : header.documents_offset].view(POINTER),
        documents=idx[header.documents_offset : header.size].view(DOCUMENT),
    )


def _structure_problems(index: UncheckedIndex) -> Iterator[Problem]:
    where, lengths = str(index.idx_path), index.lengths
    itemsize = index.header.dtype.itemsize
    beyond = index.idx_path.stat().st_size - index.header.size
    if beyond not in (0, index.header.sequences):  # a multimodal index has a byte a sequence more
        yield Problem(where, f"has {beyond} bytes more than its header promises", REDO)
    yield from _find_first_problem(
        where, len(lengths), lambda a, b: lengths[a:b] < 0, "has a negative length at sequence {}"
    )
    if len(lengths) and index.pointers[0] != 0:
        yield Problem(where, f"sequence 0 begins at byte {index.pointers[0]} of the .bin, not at 0", REDO)

    def jumps(a: int, b: int) -> np.ndarray:
        ends = index.pointers[a:b] + lengths[a:b].astype(np.int64) * itemsize
        return index.pointers[a + 1 : b + 1] != ends

    yield from _find_first_problem(
        where, len(lengths) - 1, jumps, "the sequence after {} does not begin where that one ends"
    )
    yield from _document_problems(where, index)
    yield from _size_problems(index)


def _document_problems(where: str, index: UncheckedIndex) -> Iterator[Problem]:
    documents, count = index.documents, len(index.lengths)
    if not len(documents):
        yield Problem(where, "has no document bounds, not even the first", REDO)
        return
    if documents[0] != 0:
        yield Problem(where, f"document 0 begins at sequence {documents[0]}, not at 0", REDO)
    yield from _find_first_problem(
        where,
        len(documents) - 1,
        lambda a, b: documents[a + 1 : b + 1] < documents[a:b],
        "document {} ends before it begins",
    )
    if documents[-1] != count:
        yield Problem(where, f"its documents end at sequence {documents[-1]}, it has {count} sequences", REDO)


def _size_problems(index: UncheckedIndex) -> Iterator[Problem]:
    total = sum(
        int(index.lengths[a:b].sum(dtype=np.int64)) for a, b in _split_blocks(len(index.lengths), BLOCK_ENTRIES)
    )
    size, expected = index.bin_path.stat().st_size, total * index.header.dtype.itemsize
    if size != expected:
        where = str(index.bin_path)
        yield Problem(where, f"is {size} bytes, the lengths of {index.idx_path} add up to {expected}", REDO)


def _find_first_problem(
    where: str, count: int, wrong: Callable[[int, int], np.ndarray], text: str
) -> Iterator[Problem]:
    """One problem for a rule that entries break: the first that does, and how many more."""
    first, broken = -1, 0
    for start, stop in _split_blocks(count, BLOCK_ENTRIES):
        hits = np.flatnonzero(wrong(start, stop))
        first = start + int(hits[0]) if len(hits) and first < 0 else first
        broken += len(hits)
    if broken:
        more = f", and {broken - 1} more like it" if broken > 1 else ""
        yield Problem(where, text.format(first) + more, REDO)


def _find_id_range(index: UncheckedIndex) -> tuple[float, float] | None:
    """Smallest and largest id of the whole `.bin`."""
    extremes = [(tokens.min(), tokens.max()) for _, tokens in _read_tokens(index)]
    return (min(low for low, _ in extremes), max(high for _, high in extremes)) if extremes else None


def _describe_id_problem(index: UncheckedIndex, wrong: Callable[[np.ndarray], np.ndarray], allowed: str) -> Problem:
    """The problem of ids that are out of range: the first, where it stands, and how many there are."""
    first, broken = "", 0
    for start, tokens in _read_tokens(index):
        hits = np.flatnonzero(wrong(tokens))
        if len(hits) and not first:
            offset = (start + int(hits[0])) * index.header.dtype.itemsize
            sequence = int(np.searchsorted(index.pointers, offset, side="right")) - 1
            first = f"token id {tokens[hits[0]]} in sequence {sequence}"
        broken += len(hits)
    more = f", and {broken - 1} more out of range" if broken > 1 else ""
    return Problem(str(index.bin_path), first + more, allowed)


def _read_tokens(index: UncheckedIndex) -> Iterator[tuple[int, np.ndarray]]:
    """The ids of the `.bin` and where they begin, a stretch at a time; a torn last id is left out."""
    count = index.bin_path.stat().st_size // index.header.dtype.itemsize
    with progress(f"check {index.bin_path.name}", count, "tokens") as advance:
        for start, stop in _split_blocks(count, BLOCK_TOKENS):
            yield (
                start,
                np.fromfile(
                    index.bin_path, index.header.dtype, stop - start, offset=start * index.header.dtype.itemsize
                ),
            )
            advance(stop - start)


def _split_blocks(count: int, size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, count)) for start in range(0, count, size))
