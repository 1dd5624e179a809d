"""What a GPT sample says about its documents (docs/specs/data.md §4.9), and mock data (docs/specs/data.md §4.14)."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from mt_core.contracts import Dataset
from mt_core.errors import MtError
from mt_core.plugins import component
from mt_data.config import GPTData, MockData, TokenizerConfig
from mt_data.datasets.gpt.dataset import GPTDataset, GPTSampleOptions, build_gpt_dataset, build_splits
from mt_data.datasets.gpt.indices import IndexRequest
from mt_data.datasets.mock import MockSequences
from mt_data.indexed.cache import IndexCache
from mt_data.indexed.reader import IndexedReader
from mt_data.indexed.writer import IndexedWriter
from word_pieces import toy_tokenizer

Corpus = Callable[[str, Sequence[int]], str]


def one_sequence(
    tmp_path: Path, tokens: list[int], seq_length: int, options: GPTSampleOptions, **request: int
) -> GPTDataset:
    with IndexedWriter(tmp_path / "one", np.dtype("uint16")) as writer:
        writer.add_documents(np.array(tokens), np.array([len(tokens)]))
    wanted = IndexRequest(range(1), None, seq_length, 1, **request)  # pyright: ignore[reportArgumentType]
    return build_gpt_dataset(IndexedReader(tmp_path / "one"), wanted, IndexCache(tmp_path / "cache"), options)


SAMPLE = [5, 1, 7, 8, 1, 3, 9]
"""Megatron's example: tokens 5 E 7 8 E 3, and one more."""


def test_nothing_is_added_without_options(tmp_path: Path):
    item = one_sequence(tmp_path, SAMPLE, 6, GPTSampleOptions(eod=1))[0]
    assert list(item) == ["tokens", "labels", "loss_mask"]
    assert item["loss_mask"].tolist() == [1] * 6


def test_the_end_of_a_document_leaves_the_loss(tmp_path: Path):
    item = one_sequence(tmp_path, SAMPLE, 6, GPTSampleOptions(eod=1, eod_mask_loss=True))[0]
    assert item["loss_mask"].tolist() == [1, 0, 1, 1, 0, 1]


def test_positions_restart_behind_the_end_of_a_document(tmp_path: Path):
    item = one_sequence(tmp_path, SAMPLE, 6, GPTSampleOptions(eod=1, reset_position_ids=True))[0]
    assert item["position_ids"].tolist() == [0, 1, 0, 1, 2, 0]
    assert item["position_ids"].dtype == np.int64


def test_attention_stays_within_documents(tmp_path: Path):
    item = one_sequence(tmp_path, SAMPLE, 6, GPTSampleOptions(eod=1, reset_attention_mask=True))[0]
    assert item["segment_ids"].tolist() == [0, 0, 1, 1, 1, 2]
    assert item["segment_ids"].dtype == np.int64


def test_segments_are_the_sequences(tmp_path: Path, corpus: Corpus):
    request = IndexRequest(range(3), None, 6, 1234)
    cache = IndexCache(tmp_path / "cache")
    dataset = build_gpt_dataset(
        IndexedReader(corpus("b", (4, 3, 8))), request, cache, GPTSampleOptions(inter_document_masking=True)
    )
    for i in range(len(dataset)):
        item = dict(dataset[i])
        owners = item["tokens"] // 100
        starts = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist()]
        assert item["segment_ids"].tolist() == np.repeat(range(len(starts)), np.diff([*starts, 6])).tolist()
        assert item["segment_ids"].dtype == np.int64
        assert item["position_ids"].tolist() == [n - max(s for s in starts if s <= n) for n in range(6)]


def test_the_last_segment_of_a_padded_sample_reaches_its_end(tmp_path: Path):
    options = GPTSampleOptions(inter_document_masking=True)
    dataset = one_sequence(tmp_path, [3, 4, 5], 6, options, keep_partial=True)
    assert dataset[0]["segment_ids"].tolist() == [0] * 6


def test_without_an_extra_token_the_last_label_is_padding(tmp_path: Path):
    dataset = one_sequence(tmp_path, [3, 4, 5, 6], 2, GPTSampleOptions(), extra=0)
    assert len(dataset) == 2
    assert [dataset[i]["labels"].tolist()[1] for i in range(2)] == [0, 0]
    assert [dataset[i]["loss_mask"].tolist() for i in range(2)] == [[1, 0], [1, 0]]


def test_samples_without_an_extra_token_end_with_their_document(corpus: Corpus):
    from mt_data.datasets.gpt.indices import build_indices

    lengths = IndexedReader(corpus("x", (5, 4, 2))).lengths
    identity = next(seed for seed in range(99) if np.random.RandomState(seed).permutation(3).tolist() == [0, 1, 2])
    indices = build_indices(lengths, IndexRequest(range(3), None, 4, identity, extra=0))
    assert indices.document.tolist() == [0, 1, 2]
    assert indices.sample.tolist() == [[0, 0], [0, 4], [1, 3]]


def test_padding_is_a_place_and_not_an_id(tmp_path: Path):
    with IndexedWriter(tmp_path / "docs", np.dtype("uint16")) as writer:  # as one of another tokenizer ends documents
        writer.add_documents(np.array([7, 8, 0, 9, 0]), np.array([3, 2]))
    section = GPTData(
        valid_paths=(str(tmp_path / "docs"),), seq_length=6, keep_partial_valid=True, tokenizer=toy_tokenizer(tmp_path)
    )
    built = build_splits(section, samples=(0, None, 0), seed=1, cache_dir=tmp_path / "cache")
    assert built.valid is not None
    item = built.valid[0]
    assert sorted(item["tokens"][:5].tolist()) == [0, 0, 7, 8, 9]
    assert item["labels"].tolist() == [*item["tokens"][1:].tolist(), 0]
    assert item["loss_mask"].tolist() == [1, 1, 1, 1, 0, 0]


def test_ends_of_documents_do_not_stand_in_the_padding(tmp_path: Path):
    options = GPTSampleOptions(eod=0, eod_mask_loss=True, reset_position_ids=True, reset_attention_mask=True)
    item = one_sequence(tmp_path, [3, 0, 4], 6, options, keep_partial=True)[0]
    assert item["loss_mask"].tolist() == [1, 0, 0, 0, 0, 0]
    assert item["position_ids"].tolist() == [0, 1, 0, 1, 2, 3]
    assert item["segment_ids"].tolist() == [0, 0, 1, 1, 1, 1]


def test_the_section_turns_the_options_on(corpus: Corpus, tmp_path: Path):
    section = GPTData(
        paths=(corpus("a", (60,) * 4),),
        split="1",
        seq_length=8,
        tokenizer=TokenizerConfig(type="bytes"),
        reset_position_ids=True,
        reset_attention_mask=True,
        inter_document_masking=True,
    )
    train = build_splits(section, samples=(None, 0, 0), seed=1, cache_dir=tmp_path / "cache").train
    assert train is not None
    assert set(train[0]) == {"tokens", "labels", "loss_mask", "position_ids", "segment_ids"}


@pytest.mark.parametrize("option", ["reset_position_ids", "reset_attention_mask"])
def test_options_need_a_tokenizer(corpus: Corpus, tmp_path: Path, option: str):
    section = GPTData.model_validate({"paths": (corpus("a", (9,)),), "seq_length": 4, option: True})
    with pytest.raises(MtError, match=f"data.{option}: is on, but there is no data.tokenizer"):
        build_splits(section, samples=(1, 0, 0), seed=1, cache_dir=tmp_path)


def test_the_mock_corpus_is_megatrons():
    sequences = MockSequences(eod=256, vocab_size=257)
    assert sequences.lengths[:8].tolist() == [3484, 2609, 2094, 1105, 1261, 168, 309, 68]
    assert (int(sequences.lengths.sum()), sequences.lengths.min(), sequences.lengths.max()) == (204637097, 1, 4095)
    assert sequences.get(7)[:3].tolist() == [1, 2, 3]
    assert sequences.get(0, 254, 4).tolist() == [255, 256, 0, 1]
    assert sequences.get(0)[-1] == 256


def test_mock_data_needs_no_files(tmp_path: Path):
    section = MockData(seq_length=32, tokenizer=TokenizerConfig(type="bytes"))
    built = component("dataset", "mock")(section, samples=(5, 5, 0), seed=1, cache_dir=tmp_path)
    datasets: tuple[Dataset, Dataset] = (built.train, built.valid)
    assert built.test is None
    assert all(dataset[0]["tokens"].shape == (32,) for dataset in datasets)
