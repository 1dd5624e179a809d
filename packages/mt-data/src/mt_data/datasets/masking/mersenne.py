"""The two Mersenne twisters of the C++ standard library, many numbers at a time.

The 32-bit one is inside numpy's `RandomState`; the 64-bit one (Matsumoto and Nishimura, 2000) numpy lacks.
"""

from collections.abc import Iterator

import numpy as np

WORDS, MIDDLE = 312, 156
MATRIX = np.uint64(0xB5026F5AA96619E9)
UPPER, LOWER = np.uint64(0xFFFFFFFF80000000), np.uint64(0x7FFFFFFF)
MULTIPLIER = 6364136223846793005
ONE = np.uint64(1)
BLOCK = 1 << 16


def draw_mt19937(seed: int) -> Iterator[int]:
    """What `std::mt19937(seed)` draws, without end."""
    random = np.random.RandomState(seed & 0xFFFFFFFF)
    while True:
        yield from random._bit_generator.random_raw(BLOCK).tolist()  # pyright: ignore[reportAttributeAccessIssue]


def draw_mt19937_64(seed: int, count: int) -> np.ndarray:
    """The first `count` numbers that `std::mt19937_64(seed)` draws, uint64."""
    state, blocks = _seed_state(seed), []
    for _ in range(-(-count // WORDS)):
        _twist(state)
        blocks.append(state.copy())
    return _temper(np.concatenate(blocks)[:count] if blocks else np.zeros(0, np.uint64))


def _seed_state(seed: int) -> np.ndarray:
    words = [seed % 2**64]
    for i in range(1, WORDS):
        words.append((MULTIPLIER * (words[-1] ^ words[-1] >> 62) + i) % 2**64)
    return np.array(words, np.uint64)


def _twist(state: np.ndarray) -> None:
    """The next 312 words, in three pieces, as each depends on one 156 places further that must be old or new."""
    for here, following, far in (
        (slice(0, MIDDLE), slice(1, MIDDLE + 1), slice(MIDDLE, WORDS)),
        (slice(MIDDLE, WORDS - 1), slice(MIDDLE + 1, WORDS), slice(0, MIDDLE - 1)),
        (slice(WORDS - 1, WORDS), slice(0, 1), slice(MIDDLE - 1, MIDDLE)),
    ):
        mixed = (state[here] & UPPER) | (state[following] & LOWER)
        state[here] = state[far] ^ (mixed >> ONE) ^ np.where(mixed & ONE, MATRIX, np.uint64(0))


def _temper(words: np.ndarray) -> np.ndarray:
    words = words ^ ((words >> np.uint64(29)) & np.uint64(0x5555555555555555))
    words ^= (words << np.uint64(17)) & np.uint64(0x71D67FFFEDA60000)
    words ^= (words << np.uint64(37)) & np.uint64(0xFFF7EEE000000000)
    return words ^ (words >> np.uint64(43))
