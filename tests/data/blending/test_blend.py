"""Blends, from the golden examples of docs/specs/data.md §4.12 (made by running Megatron)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mt_core.errors import MtError
from mt_data.blending.blend import blend_by_weights, blend_exhaustively
from mt_data.blending.interleave import SHORTEST_CHUNK


def test_a_weighted_blend_follows_the_largest_deficit():
    dataset, sample = blend_by_weights([0.5, 0.3, 0.2], 12)
    assert dataset.tolist() == [0, 1, 2, 0, 1, 0, 2, 0, 1, 0, 0, 1]
    assert sample.tolist() == [0, 0, 0, 1, 1, 2, 1, 3, 2, 4, 5, 3]
    assert (dataset.dtype, sample.dtype) == (np.int16, np.int64)


def test_weights_need_not_add_up_to_one():
    assert blend_by_weights([3, 1], 11)[0].tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0]
    assert blend_by_weights([3, 1], 11)[1].tolist() == [0, 0, 1, 2, 3, 1, 4, 5, 6, 2, 7]


def test_exhaustive_blend_serves_every_sample_once():
    dataset, sample = blend_exhaustively([5, 3, 1])
    assert dataset.tolist() == [0, 1, 2, 0, 1, 0, 0, 1, 0]
    assert sample.tolist() == [0, 0, 0, 1, 1, 2, 3, 2, 4]


def one_at_a_time(weights: list[float], size: int, limits: list[int] | None = None) -> list[int]:
    """The rule as the specification has it."""
    shares, counts, order = np.array(weights) / np.sum(np.array(weights)), np.zeros(len(weights)), []
    for i in range(size):
        lag = shares * float(max(i, 1)) - counts
        if limits is not None:
            lag[counts >= limits] = -np.inf
        order.append(int(np.argmax(lag)))
        counts[order[-1]] += 1
    return order


WEIGHTS = st.one_of(st.floats(0.01, 10), st.sampled_from([1.0, 1e-5, 3.0]))


@settings(deadline=None)
@given(weights=st.lists(WEIGHTS, min_size=1, max_size=12), size=st.integers(0, 6 * SHORTEST_CHUNK))
def test_chunks_side_by_side_give_what_one_loop_gives(weights: list[float], size: int):
    dataset, sample = blend_by_weights(weights, size)
    assert dataset.tolist() == one_at_a_time(weights, size)
    for k in range(len(weights)):
        assert sample[dataset == k].tolist() == list(range(int((dataset == k).sum())))


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(1, 200), min_size=1, max_size=10))
def test_an_exhaustive_blend_gives_what_one_loop_gives(sizes: list[int]):
    dataset, sample = blend_exhaustively(sizes)
    assert dataset.tolist() == one_at_a_time([float(size) for size in sizes], sum(sizes), sizes)
    assert np.bincount(dataset, minlength=len(sizes)).tolist() == sizes
    for k, size in enumerate(sizes):
        assert sample[dataset == k].tolist() == list(range(size))


def test_wrong_guesses_are_run_again():
    weights = [1.0] * 60 + [1e-3, 2e-4, 3e-6]  # datasets whose turns the warm-up does not see
    assert blend_by_weights(weights, 40 * SHORTEST_CHUNK)[0].tolist() == one_at_a_time(weights, 40 * SHORTEST_CHUNK)


def test_a_dataset_without_samples_is_refused():
    with pytest.raises(MtError, match="dataset 1 of the blend has no samples"):
        blend_exhaustively([5, 0])


def test_more_datasets_than_an_int16_numbers_are_refused():
    with pytest.raises(MtError, match="blends 32767 datasets; at most 32766"):
        blend_by_weights([1.0] * 32767, 1)
