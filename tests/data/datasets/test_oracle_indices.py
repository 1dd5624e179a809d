"""Index arrays against Megatron's own compiled functions, on random input."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mt_data.blending.blend import blend_by_weights, blend_exhaustively
from mt_data.blending.interleave import SHORTEST_CHUNK
from mt_data.datasets.gpt.indices import IndexRequest, build_indices
from mt_data.datasets.masking.sentence_mapping import (
    Sentences,
    SentenceSampling,
    build_block_mapping,
    build_sentence_mapping,
)

pytestmark = pytest.mark.usefixtures("megatron_core")

often = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])


def get_helpers() -> Any:
    """Megatron's compiled functions, imported by the first test that needs them."""
    return pytest.importorskip("megatron.core.datasets.helpers_cpp")


seldom = settings(deadline=None, max_examples=25)

MANY = 2**31 - 2

weights = st.lists(st.one_of(st.floats(1e-6, 10), st.integers(1, 5), st.just(1.0)), min_size=1, max_size=40)


@st.composite
def documents(draw: st.DrawFn) -> Sentences:
    """A slice of a corpus of documents of a few sentences, some of them too long."""
    sizes = draw(st.lists(st.integers(0, 7), min_size=1, max_size=8).filter(any))
    bounds = np.concatenate(([0], np.cumsum(sizes)))
    length = st.one_of(st.integers(1, 30), st.sampled_from([511, 512, 513]))
    lengths = draw(st.lists(length, min_size=int(bounds[-1]), max_size=int(bounds[-1])))
    first = draw(st.integers(0, len(sizes) - 1))
    last = draw(st.integers(first + 1, len(sizes)))
    return Sentences(np.array(lengths, np.int32), bounds[first : last + 1])


def reference_blend(given: list[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    shares = np.array(given, np.float64) / np.sum(np.array(given, np.float64))
    dataset, sample = np.zeros(size, np.int16), np.zeros(size, np.int64)
    get_helpers().build_blending_indices(dataset, sample, shares, len(given), size, False)
    return dataset, sample


@often
@given(weights=weights, size=st.integers(1, 20 * SHORTEST_CHUNK))
def test_weighted_blends(weights: list[float], size: int):
    for ours, reference in zip(blend_by_weights(weights, size), reference_blend(weights, size), strict=True):
        assert np.array_equal(ours, reference)
        assert ours.dtype == reference.dtype


@pytest.mark.parametrize("spread", [0, 1, 3, 6])
def test_large_blends(spread: int):
    weights = (10 ** -np.random.default_rng(spread).uniform(0, spread, 100)).tolist()
    for ours, reference in zip(blend_by_weights(weights, 300_000), reference_blend(weights, 300_000), strict=True):
        assert np.array_equal(ours, reference)


@often
@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=30))
def test_exhaustive_blends(sizes: list[int]):
    dataset, sample = np.zeros(sum(sizes), np.int16), np.zeros(sum(sizes), np.int64)
    get_helpers().build_exhaustive_blending_indices(dataset, sample, np.array(sizes, np.int64), len(sizes))
    ours = blend_exhaustively(sizes)
    assert np.array_equal(ours[0], dataset)
    assert np.array_equal(ours[1], sample)


@often
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=20),
    samples=st.integers(1, 60),
    seq_length=st.integers(1, 12),
    extra=st.sampled_from([0, 1]),
    seed=st.integers(0, 2**32 - 1),
)
def test_sample_indexes(lengths: list[int], samples: int, seq_length: int, extra: int, seed: int):
    request = IndexRequest(range(len(lengths)), samples, seq_length, seed, extra=extra)
    array = np.array(lengths, np.int32)
    ours = build_indices(array, request)
    epochs = len(ours.document) // len(lengths)
    reference = get_helpers().build_sample_idx_int32(
        array, ours.document, seq_length, epochs, sum(lengths), True, extra
    )
    assert np.array_equal(ours.sample, reference)


@often
@given(
    sentences=documents(),
    longest=st.integers(2, 50),
    min_sentences=st.integers(1, 2),
    short_prob=st.sampled_from([0, 0.1, 0.3, 0.4, 0.6, 0.9, 1]),
    seed=st.integers(0, 2**31 - 2),
    samples=st.integers(1, 40),
)
def test_sentence_mappings(
    sentences: Sentences, longest: int, min_sentences: int, short_prob: float, seed: int, samples: int
):
    ours = build_sentence_mapping(sentences, SentenceSampling(longest, min_sentences, short_prob, seed, samples))
    if len(ours):  # where there is nothing to gather Megatron goes on for 2^31 epochs
        bounds, lengths = sentences.documents, sentences.lengths
        reference = get_helpers().build_mapping(
            bounds, lengths, MANY, samples, longest, short_prob, seed, False, min_sentences
        )
        assert np.array_equal(ours, reference)
        assert ours.dtype == reference.dtype


@often
@given(
    sentences=documents(),
    longest=st.integers(2, 50),
    min_sentences=st.integers(1, 2),
    seed=st.integers(0, 2**31 - 2),
    epochs=st.integers(1, 3),
)
def test_block_mappings(sentences: Sentences, longest: int, min_sentences: int, seed: int, epochs: int):
    titles = np.arange(len(sentences.documents) - 1, dtype=np.int32) % 4
    one = len(build_block_mapping(sentences, titles, SentenceSampling(longest, min_sentences, 0, seed, None)))
    if one:
        ours = build_block_mapping(sentences, titles, SentenceSampling(longest, min_sentences, 0, seed, epochs * one))
        bounds, lengths = sentences.documents, sentences.lengths
        reference = get_helpers().build_blocks_mapping(
            bounds, lengths, titles, epochs, MANY, longest, seed, False, min_sentences == 1
        )
        assert np.array_equal(ours, reference)
