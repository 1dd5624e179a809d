"""Near-duplicates: MinHash signatures, buckets of equal bands, and the exact similarity within each bucket.

Signatures, 4 bytes a seed, are in a file beside the output and memory-mapped; texts are read again where two are
compared. So memory is some 16 bytes a document. Every stage is resumable, and the result depends on nothing but the
input and the options: the first document of a bucket is the one that the others are compared with.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import numpy as np

from mt_core.errors import MtError, Problem, raise_if
from mt_core.plugins import import_library
from mt_data.corpus.records import LocatedLines, Record, read_lines, read_record, to_line
from mt_data.corpus.step import CorpusStep, StepOutput, run_step
from mt_data.text_io.lines import COMPRESSED, check_inputs

CACHED_TEXTS = 256
"""Sets of shingles that stay in memory."""
Denominator = Literal["union", "min", "max"]
ODD = 0x9E3779B97F4A7C15
"""2⁶⁴ over the golden ratio."""
SHINGLE = 5
"""Characters in a shingle."""


@dataclass(frozen=True, slots=True)
class DuplicateSearch:
    """What counts as a duplicate, and how hard to look."""

    key: str = "text"
    id_key: str = "url"
    """Key of what tells records apart."""
    threshold: float = 0.5
    """Pairs more alike than this are written."""
    denominator: Denominator = "union"
    bands: int = 10
    seeds: int = 100
    """MinHash values of a document; seeds / bands of them make a band."""
    rounds: int = 1
    """Documents of a bucket with which the others are compared; -1 compares all pairs."""
    seed: int = 1234

    @property
    def fingerprint(self) -> np.dtype:
        """A document in the file of signatures."""
        return np.dtype([("file", "<u4"), ("offset", "<u8"), ("bytes", "<u4"), ("values", "<u4", self.seeds)])


def find_duplicates(
    inputs: Sequence[Path], output: Path, search: DuplicateSearch, *, workers: int = 1
) -> dict[str, int]:
    """Write a line {id: [{id: similarity}, …]} for each document that has near-duplicates behind it."""
    _check_inputs(inputs, search)
    signatures = output.with_name(f"{output.name}.signatures")
    options = {"key": search.key, "id_key": search.id_key, "seeds": search.seeds, "seed": search.seed}
    step = CorpusStep("signatures", signatures, tuple(inputs), options, workers)
    counts = run_step(step, read_lines(inputs), partial(compute_signatures, search))
    prints = np.fromfile(signatures, search.fingerprint, 0)
    if counts.get("records"):
        prints = np.memmap(signatures, search.fingerprint, mode="r")
    step = CorpusStep("find-duplicates", output, tuple(inputs), {"search": repr(search)})
    return counts | run_step(step, range(search.bands), BandSearch(tuple(inputs), prints, search))


def _check_inputs(inputs: Sequence[Path], search: DuplicateSearch) -> None:
    check_inputs(inputs)
    raise_if(
        Problem(str(path), "is compressed, but its texts are read in any order", "decompress it first")
        for path in inputs
        if path.suffix in COMPRESSED
    )
    if search.bands < 1 or search.seeds % search.bands:
        raise MtError("--num-seeds", f"{search.seeds} is no multiple of --num-bands {search.bands}", "one that is")


def compute_signatures(search: DuplicateSearch, lines: LocatedLines) -> StepOutput:
    """Signatures of some lines, as they lie in the file."""
    prints, offset = np.zeros(len(lines.chunk.lines), search.fingerprint), lines.offset
    for row, line in enumerate(lines.chunk.lines):
        where = f"{lines.chunk.path}:{lines.chunk.first + row}"
        record = read_record(line, (search.key, search.id_key), where)
        assert record is not None
        values = compute_signature(record[search.key], seeds=search.seeds, seed=search.seed)
        prints[row] = (lines.file, offset, len(line), values)
        offset += len(line) + 1
    return StepOutput(prints.tobytes(), Counter(records=len(prints)))


class BandSearch:
    """Finds the duplicates of one band; a pair may be found in several."""

    def __init__(self, inputs: tuple[Path, ...], prints: np.ndarray, search: DuplicateSearch) -> None:
        self._inputs, self._prints, self._search = inputs, prints, search
        self._shingles = lru_cache(CACHED_TEXTS)(
            lambda document: make_shingles(self._read_record(document)[search.key])
        )

    def __call__(self, band: int) -> StepOutput:
        """Lines of one band."""
        produced, out = StepOutput(), []
        for bucket in self._find_buckets(band):
            for main, others in self._compare(bucket):
                names = [{self._read_name(other): round(likeness, 6)} for other, likeness in others]
                out.append({self._read_name(main): names})
                produced.counts["pairs"] += len(others)
        produced.data = b"".join(map(to_line, out))
        return produced

    def _find_buckets(self, band: int) -> Iterator[list[int]]:
        """Documents whose values of a band are equal, in the order of their first."""
        rows = self._search.seeds // self._search.bands
        values = self._prints["values"]
        hashed = hash_rows([values[:, column] for column in range(band * rows, (band + 1) * rows)], len(values))
        order = np.argsort(hashed, kind="stable")
        starts = np.flatnonzero(np.diff(hashed[order], prepend=~hashed[order][:1]))
        stops = np.append(starts[1:], len(order))
        shared = np.flatnonzero(stops - starts > 1)
        buckets = (order[starts[n] : stops[n]].tolist() for n in shared)
        return iter(sorted(buckets))

    def _compare(self, bucket: list[int]) -> Iterator[tuple[int, list[tuple[int, float]]]]:
        rounds = self._search.rounds if self._search.rounds >= 0 else len(bucket)
        for _ in range(rounds):
            main, *rest = bucket
            alike = [(other, self._compute_likeness(main, other)) for other in rest]
            alike = [(other, likeness) for other, likeness in alike if likeness > self._search.threshold]
            if alike:
                yield main, alike
            bucket = [other for other in rest if other not in dict(alike)]
            if len(bucket) < 2:
                return

    def _compute_likeness(self, a: int, b: int) -> float:
        return compute_jaccard(self._shingles(a), self._shingles(b), self._search.denominator)

    def _read_record(self, document: int) -> Record:
        location = self._prints[document]
        with self._inputs[int(location["file"])].open("rb") as file:
            file.seek(int(location["offset"]))
            return json.loads(file.read(int(location["bytes"])))

    def _read_name(self, document: int) -> str:
        return self._read_record(document)[self._search.id_key]


def make_shingles(text: str) -> set[str]:
    """All runs of five characters but, as in Megatron, the last."""
    return {text[start : start + SHINGLE] for start in range(len(text) - SHINGLE)}


def compute_jaccard(a: set[str], b: set[str], denominator: Denominator = "union") -> float:
    """Shared shingles over those of both, of the smaller or of the larger set; 0 for an empty set."""
    if not a or not b:
        return 0.0
    shared = len(a & b)
    sizes = {"union": len(a) + len(b) - shared, "min": min(len(a), len(b)), "max": max(len(a), len(b))}
    return shared / sizes[denominator]


def compute_signature(text: str, *, seeds: int, seed: int) -> np.ndarray:
    """MinHash values of a text, uint32 [seeds]."""
    library = import_library("datasketch", where="mt data openwebtext find-duplicates", requires=["mt-data[corpus]"])
    hashed = library.MinHash(num_perm=seeds, seed=seed, scheme="affine32", hashfunc=int)
    if len(shingles := hash_shingles(text)):
        hashed.update_batch(shingles.tolist())
    return hashed.hashvalues.astype(np.uint32)


def hash_shingles(text: str) -> np.ndarray:
    """A number of 32 bits for each distinct shingle of a text, all computed at once."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    count = max(0, len(codes) - SHINGLE)
    return np.unique(hash_rows([codes[offset : offset + count] for offset in range(SHINGLE)], count) >> np.uint64(32))


def hash_rows(columns: Sequence[np.ndarray], count: int) -> np.ndarray:
    """One number of 64 bits for each of `count` rows of these columns; rows that differ rarely share one."""
    rows = np.zeros(count, np.uint64)
    for column in columns:
        rows = (rows ^ column) * np.uint64(ODD)
        rows ^= rows >> np.uint64(29)
    return rows
