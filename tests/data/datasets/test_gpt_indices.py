"""Megatron's orders, from the golden examples of docs/specs/data.md §4.10 (made by running Megatron)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mt_core.errors import MtError
from mt_data.datasets.gpt.indices import IndexRequest, build_indices

LENGTHS = np.array([7, 3, 5, 9, 2, 4], np.int32)


def golden(samples: int | None) -> IndexRequest:
    return IndexRequest(range(6), samples, seq_length=4, seed=1234)


def test_a_small_last_epoch_is_shuffled_by_itself():
    indices = build_indices(LENGTHS, golden(10))
    assert indices.document.tolist() == [2, 1, 5, 0, 4, 3, 0, 4, 3, 2, 5, 1]
    assert indices.sample.tolist() == [
        [0, 0], [0, 4], [2, 0], [3, 0], [3, 4], [4, 1], [5, 3], [5, 7], [6, 2], [6, 6], [8, 1], [8, 5], [9, 0], [9, 4],
        [10, 3],
    ]  # fmt: skip
    assert indices.shuffle.tolist() == [1, 0, 3, 2, 5, 4, 6, 9, 10, 12, 8, 11, 13, 7]
    assert [a.dtype for a in (indices.document, indices.sample, indices.shuffle)] == [np.int32, np.int32, np.uint32]


def test_a_large_last_epoch_is_shuffled_with_the_others():
    indices = build_indices(LENGTHS, golden(13))
    assert indices.document.tolist() == [1, 2, 5, 2, 3, 4, 1, 0, 4, 5, 0, 3]
    assert indices.sample.tolist() == [
        [0, 0], [1, 1], [2, 0], [3, 0], [3, 4], [4, 3], [4, 7], [6, 0], [7, 1], [7, 5], [9, 0], [10, 0], [10, 4],
        [11, 1], [11, 5],
    ]  # fmt: skip
    assert indices.shuffle.tolist() == [7, 11, 2, 3, 1, 9, 5, 4, 0, 8, 6, 10, 13, 12]


@pytest.mark.parametrize("samples", [7, None])
def test_one_epoch(samples: int | None):
    indices = build_indices(LENGTHS, golden(samples))
    assert indices.document.tolist() == [2, 1, 5, 0, 4, 3]
    assert indices.sample.tolist() == [[0, 0], [0, 4], [2, 0], [3, 0], [3, 4], [4, 1], [5, 3], [5, 7]]
    assert indices.shuffle.tolist() == [5, 0, 3, 4, 2, 6, 1]


def test_a_partial_last_sample_ends_at_the_last_token():
    lengths = np.array([5, 4, 2], np.int32)
    indices = build_indices(lengths, IndexRequest(range(3), None, seq_length=4, seed=1234, keep_partial=True))
    assert indices.sample.tolist() == [[0, 0], [0, 4], [1, 3], [2, 1]]
    assert indices.shuffle.tolist() == [1, 2, 0]


def test_sequences_without_tokens_are_an_error_not_an_endless_loop():
    with pytest.raises(MtError, match="2 sequences without tokens give no samples"):
        build_indices(np.zeros(2, np.int32), IndexRequest(range(2), 5, seq_length=4, seed=1))


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any),
    samples=st.integers(1, 40),
    seq_length=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_row_k_stands_at_token_k_times_L_of_the_stream(lengths: list[int], samples: int, seq_length: int, seed: int):
    indices = build_indices(np.array(lengths, np.int32), IndexRequest(range(len(lengths)), samples, seq_length, seed))
    stream = [(position, j) for position, s in enumerate(indices.document.tolist()) for j in range(lengths[s])]
    rows = [tuple(row) for row in indices.sample.tolist()]
    assert rows == stream[: len(rows) * seq_length : seq_length]
    assert len(rows) - 1 >= samples
    assert sorted(indices.shuffle.tolist()) == list(range(len(rows) - 1))
