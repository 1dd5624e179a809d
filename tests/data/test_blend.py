"""Blends, from the golden examples of spec/data.md §4.12 (made by running Megatron)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mt_core.errors import MtError
from mt_data.blend import exhaustive_blend, sized_blend


def test_sized_blend_follows_the_largest_deficit():
    dataset, sample = sized_blend([0.5, 0.3, 0.2], 12)
    assert dataset.tolist() == [0, 1, 2, 0, 1, 0, 2, 0, 1, 0, 0, 1]
    assert sample.tolist() == [0, 0, 0, 1, 1, 2, 1, 3, 2, 4, 5, 3]
    assert (dataset.dtype, sample.dtype) == (np.int16, np.int64)


def test_weights_need_not_add_up_to_one():
    assert sized_blend([3, 1], 11)[0].tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0]
    assert sized_blend([3, 1], 11)[1].tolist() == [0, 0, 1, 2, 3, 1, 4, 5, 6, 2, 7]


def test_exhaustive_blend_serves_every_sample_once():
    dataset, sample = exhaustive_blend([5, 3, 1])
    assert dataset.tolist() == [0, 1, 2, 0, 1, 0, 0, 1, 0]
    assert sample.tolist() == [0, 0, 0, 1, 1, 2, 3, 2, 4]


@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=6), size=st.integers(0, 60))
def test_the_loop_equals_numpy_argmax_over_float64(weights: list[float], size: int):
    shares, counts, expected = np.array(weights) / np.sum(np.array(weights)), np.zeros(len(weights)), []
    for i in range(size):
        expected.append(int(np.argmax(shares * float(max(i, 1)) - counts)))
        counts[expected[-1]] += 1
    assert sized_blend(weights, size)[0].tolist() == expected


def test_a_dataset_without_samples_is_refused():
    with pytest.raises(MtError, match="dataset 1 of the blend has no samples"):
        exhaustive_blend([5, 0])


def test_more_datasets_than_an_int16_numbers_are_refused():
    with pytest.raises(MtError, match="blends 32767 datasets; at most 32766"):
        sized_blend([1.0] * 32767, 1)
