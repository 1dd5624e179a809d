"""Which lines of conversations share a sample (`data.pack_lines`), so that few of its tokens are padding."""

from collections.abc import Callable, Iterator

import numpy as np

from mt_core.progress import progress
from mt_data.indexed.cache import IndexCache, hash_content

VERSION = 1
"""Part of the name of stored arrays; another rule of packing has another."""


def pack_lines(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The first line of each sample and at last the number of lines, int64 [samples + 1], of lines of so many tokens.

    Lines keep their order. One joins the sample before it if all of it fits; one that is longer than a sample has its
    own, and is cut off there.
    """
    starts, used = [0], 0
    for line, size in enumerate(sizes.tolist()):
        if line > starts[-1] and used + size > capacity:
            starts.append(line)
            used = 0
        used += size
    return np.array([*starts, len(sizes)] if len(sizes) else [0], np.int64)


def find_samples(
    elements: range, count_tokens: Callable[[int], int], *, capacity: int, key: str, cache: IndexCache
) -> np.ndarray:
    """`pack_lines` of the elements of a file, whose tokens are counted once; stored under all that they depend on."""

    def build() -> dict[str, np.ndarray]:
        return {"starts": pack_lines(np.fromiter(_count(elements, count_tokens), np.int64, len(elements)), capacity)}

    (starts,) = cache.get_arrays(hash_content("sft lines", VERSION, key, elements, capacity), ("starts",), build)
    return starts


def _count(elements: range, count_tokens: Callable[[int], int]) -> Iterator[int]:
    with progress("counting tokens", len(elements), "lines") as advance:
        for number in elements:
            yield count_tokens(number)
            advance(1)
