"""Sentence mappings and masked words, from the golden examples of docs/specs/data.md §5.1."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mt_data.datasets.masking.mask import MaskingConfig, WordPieceGroups, mask_tokens
from mt_data.datasets.masking.mersenne import draw_mt19937_64
from mt_data.datasets.masking.sentence_mapping import Sentences, SentenceSampling, build_sentence_mapping

BOUNDS = np.array([0, 3, 4, 9, 9, 14])
LENGTHS = np.array([5, 4, 6, 8, 3, 5, 4, 6, 2, 7, 6, 5, 4, 3], np.int32)


def test_two_epochs_with_short_targets():
    rows = build_sentence_mapping(Sentences(LENGTHS, BOUNDS), SentenceSampling(12, 2, 0.3, 1234, samples=10))
    assert rows.tolist() == [
        [11, 14, 4], [9, 11, 12], [0, 3, 7], [11, 14, 11], [4, 6, 2], [0, 3, 12], [4, 6, 2], [6, 9, 12], [6, 9, 12],
        [9, 11, 12],
    ]  # fmt: skip
    assert rows.dtype == np.uint32


def test_one_epoch_of_full_targets_and_single_sentences():
    rows = build_sentence_mapping(Sentences(LENGTHS, BOUNDS), SentenceSampling(12, 1, 0, 1234, samples=None))
    assert rows.tolist() == [[11, 14, 12], [3, 4, 12], [0, 3, 12], [4, 7, 12], [9, 11, 12], [7, 9, 12]]


def test_documents_without_enough_sentences_end_the_mapping():
    rows = build_sentence_mapping(Sentences(LENGTHS, BOUNDS[1:3]), SentenceSampling(12, 2, 0.1, 1, samples=5))
    assert rows.shape == (0, 3)


@pytest.mark.parametrize(("longest", "used"), [(512, 1), (513, 0)])
def test_a_document_with_a_sentence_beyond_512_tokens_is_left_out(longest: int, used: int):
    sentences = Sentences(np.array([3, longest], np.int32), np.array([0, 2]))
    assert len(build_sentence_mapping(sentences, SentenceSampling(600, 2, 0, 1, samples=None))) == used


def test_the_64_bit_twister_gives_the_number_that_the_c_plus_plus_standard_names():
    assert draw_mt19937_64(5489, 10_000)[-1] == 9981545732273789042


@given(
    count=st.integers(1, 60),
    prob=st.sampled_from([0.15, 0.5]),
    ngram=st.integers(1, 5),
    geometric=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_masked_tokens_are_whole_words_within_the_budget(
    count: int, prob: float, ngram: int, geometric: bool, seed: int
):
    tokens = [2, *(10 + n % 4 for n in range(count)), 3]
    groups = WordPieceGroups(frozenset((2, 3)), frozenset((12,)))
    words = groups.group_words(tokens, full_words=True)
    random = np.random.RandomState(seed)
    masked = mask_tokens(
        tokens,
        words,
        len(tokens),
        MaskingConfig(prob, ngram, geometric=geometric),
        random=random,
        replace=lambda token, draws: 99,
        lengths_random=random,
    )
    assert len(masked.labels) <= max(1, round(prob * len(tokens)))
    assert all(masked.tokens[position] == 99 and tokens[position] == label for position, label in masked.labels.items())
    assert [t for n, t in enumerate(masked.tokens) if n not in masked.labels] == [
        t for n, t in enumerate(tokens) if n not in masked.labels
    ]
    for word in words:
        assert len(set(word) & set(masked.labels)) in (0, len(word))
    assert sorted(position for span in masked.spans for position in span) == sorted(masked.labels)


def test_permuted_tokens_change_places_among_themselves():
    tokens = list(range(100, 140))
    words = [[n] for n in range(40)]
    random = np.random.RandomState(3)
    masked = mask_tokens(
        tokens,
        words,
        40,
        MaskingConfig(0.2, 1, permute=True),
        random=random,
        replace=lambda token, draws: 0,
        lengths_random=np.random.RandomState(3),
    )
    mask_positions = {position for position, token in enumerate(masked.tokens) if token == 0}
    moved = set(masked.labels) - mask_positions
    assert (len(mask_positions), len(moved)) == (8, 8)
    assert sorted(masked.tokens[n] for n in moved) == sorted(tokens[n] for n in moved)
