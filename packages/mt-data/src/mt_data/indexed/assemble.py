"""An `.idx` file from streams of blocks: constant memory, however many sequences there are.

Source: docs/specs/data.md §1.2.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np

from mt_data.indexed.format import DOCUMENT, LENGTH, POINTER, Header

Blocks = Callable[[], Iterable[np.ndarray]]
"""Gives the blocks of an array from the beginning; it may be called more than once."""


@dataclass(frozen=True, slots=True)
class IndexParts:
    """What an `.idx` is made from."""

    dtype: np.dtype
    sequences: int
    documents: int
    lengths: Blocks
    """Tokens of each sequence."""
    sequence_counts: Blocks
    """Sequences of each document."""
    modes: Blocks | None = None
    """Mode of each sequence, in multimodal files."""


def write_index(file: IO[bytes], parts: IndexParts) -> None:
    """Write header, lengths, pointers, document bounds, and modes if there are any."""
    file.write(Header(parts.dtype, parts.sequences, parts.documents + 1).pack())
    for block in parts.lengths():
        file.write(block.astype(LENGTH, copy=False).tobytes())
    for block in _starts(parts.lengths()):
        file.write((block * parts.dtype.itemsize).astype(POINTER, copy=False).tobytes())
    file.write(np.zeros(1, DOCUMENT).tobytes())
    for block in _ends(parts.sequence_counts()):
        file.write(block.astype(DOCUMENT, copy=False).tobytes())
    for block in parts.modes() if parts.modes else ():
        file.write(block.astype(np.int8, copy=False).tobytes())


def _ends(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    total = 0
    for block in blocks:
        ends = np.cumsum(block, dtype=np.int64) + total
        total = int(ends[-1]) if len(ends) else total
        yield ends


def _starts(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    total = 0
    for block in blocks:
        ends = np.cumsum(block, dtype=np.int64) + total
        yield ends - block
        total = int(ends[-1]) if len(ends) else total
