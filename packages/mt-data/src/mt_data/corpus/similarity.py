"""Likeness of two texts: their sets of shingles, Jaccard similarity, and MinHash signatures that estimate it."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from mt_data.corpus.libraries import library

Denominator = Literal["union", "min", "max"]

ODD = 0x9E3779B97F4A7C15
"""2⁶⁴ over the golden ratio."""
SHINGLE = 5
"""Characters in a shingle."""


def shingles(text: str) -> set[str]:
    """All runs of five characters but, as in Megatron, the last."""
    return {text[at : at + SHINGLE] for at in range(len(text) - SHINGLE)}


def jaccard(a: set[str], b: set[str], denominator: Denominator = "union") -> float:
    """Shared shingles over those of both, of the smaller or of the larger set; 0 for an empty set."""
    if not a or not b:
        return 0.0
    shared = len(a & b)
    sizes = {"union": len(a) + len(b) - shared, "min": min(len(a), len(b)), "max": max(len(a), len(b))}
    return shared / sizes[denominator]


def signature(text: str, *, seeds: int, seed: int) -> np.ndarray:
    """MinHash values of a text, uint32 [seeds]."""
    hashed = library("datasketch").MinHash(num_perm=seeds, seed=seed, scheme="affine32", hashfunc=int)
    if len(found := shingle_hashes(text)):
        hashed.update_batch(found.tolist())
    return hashed.hashvalues.astype(np.uint32)


def shingle_hashes(text: str) -> np.ndarray:
    """A number of 32 bits for each distinct shingle of a text, all computed at once."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    count = max(0, len(codes) - SHINGLE)
    return np.unique(mixed([codes[at : at + count] for at in range(SHINGLE)], count) >> np.uint64(32))


def mixed(columns: Sequence[np.ndarray], count: int) -> np.ndarray:
    """One number of 64 bits for each of `count` rows of these columns; rows that differ rarely share one."""
    rows = np.zeros(count, np.uint64)
    for column in columns:
        rows = (rows ^ column) * np.uint64(ODD)
        rows ^= rows >> np.uint64(29)
    return rows
