"""Samples against Megatron's own dataset classes, on random corpora and settings."""

import importlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from mt_core.errors import MtError
from mt_data.config import GPTData
from mt_data.datasets.bert import BERTDataset
from mt_data.datasets.bert import BERTTokenIds as BERTIds
from mt_data.datasets.gpt.dataset import GPTDataset, GPTSampleOptions, build_gpt_dataset, build_splits
from mt_data.datasets.gpt.indices import IndexRequest
from mt_data.datasets.masking.build import SentenceSamples
from mt_data.datasets.masking.mask import MaskingConfig, WordPieceGroups
from mt_data.datasets.masking.sentence_mapping import Sentences, SentenceSampling, build_sentence_mapping
from mt_data.datasets.mock import MockSequences
from mt_data.datasets.t5 import T5Dataset
from mt_data.datasets.t5 import T5TokenIds as T5Ids
from mt_data.indexed.cache import IndexCache
from mt_data.indexed.reader import IndexedReader
from mt_data.indexed.writer import IndexedWriter

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("megatron_core")

EOD = 5
NO_ID = 5_000
"""A padding that stands in no text: Megatron masks an id wherever it is, mt what it filled up itself."""
some = settings(deadline=None, max_examples=30)


def theirs(name: str) -> Any:
    """A module of Megatron's datasets, imported by the first test that needs it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"megatron.core.datasets.{name}")


class ToyTokenizer:
    """What Megatron's datasets ask a tokenizer for: 40 WordPieces, of which 7, 10, 12 and 17 go on with a word."""

    cls, sep, pad, mask, bos, eos, eod = 2, 3, NO_ID, 4, 20, 21, 3
    vocab_size = 40

    def __init__(self) -> None:
        self.additional_special_tokens_ids = list(range(22, 40))
        self.inv_vocab = {i: ("##" if i in (7, 10, 12, 17) else "") + f"t{i}" for i in range(40)}
        self.unique_identifiers, self.special_tokens_dict = {"class": "toy"}, {}


class StreamTokenizer:
    """Ids of a GPT corpus: an end of document, and a padding."""

    eod, pad, vocab_size = EOD, NO_ID, 1000

    def __init__(self) -> None:
        self.unique_identifiers, self.special_tokens_dict = {"class": "toy"}, {}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    """Megatron builds the indexes of BERT and T5 within torch.distributed only."""
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()


def write(prefix: Path, documents: list[list[list[int]]]) -> str:
    with IndexedWriter(prefix, np.dtype("uint16")) as writer:
        for sentences in documents:
            writer.add_document(
                np.concatenate([*sentences, []]).astype(int), np.array([len(s) for s in sentences], int)
            )
    return str(prefix)


def assert_equal(ours: Mapping[str, Any], reference: Mapping[str, Any], names: set[str]) -> None:
    assert names <= set(ours)
    for name in names:
        assert np.array_equal(np.asarray(ours[name]), np.asarray(reference[name])), name


sequence = st.lists(st.integers(0, 12), min_size=1, max_size=14)
corpus = st.lists(sequence, min_size=1, max_size=8).map(lambda texts: [[text] for text in texts])


@some
@given(
    documents=corpus,
    samples=st.one_of(st.none(), st.integers(1, 30)),
    seq_length=st.integers(1, 9),
    extra=st.booleans(),
    drop=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_gpt_samples(
    documents: list[list[list[int]]],
    samples: int | None,
    seq_length: int,
    extra: bool,
    drop: bool,
    seed: int,
    flags: tuple[bool, bool, bool],
):
    names = ("eod_mask_loss", "reset_position_ids", "reset_attention_mask")
    chosen = dict(zip(names, flags, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        prefix = write(Path(folder) / "c", documents)
        config = theirs("gpt_dataset").GPTDatasetConfig(
            random_seed=seed, sequence_length=seq_length, blend=([prefix], None), split="1",
            tokenizer=StreamTokenizer(), add_extra_token_to_sequence=extra, drop_last_partial_validation_sequence=drop,
            **(chosen | {"create_attention_mask": True}),
        )  # fmt: skip
        indices = np.arange(len(documents), dtype=np.int32)

        def megatrons() -> Any:
            return theirs("gpt_dataset").GPTDataset(
                theirs("indexed_dataset").IndexedDataset(prefix),
                prefix,
                indices,
                samples,
                theirs("utils").Split.valid,
                config,
            )

        reference = megatrons()
        ours = build_gpt_dataset(
            IndexedReader(prefix),
            IndexRequest(range(len(documents)), samples, seq_length, seed, keep_partial=not drop, extra=int(extra)),
            IndexCache(Path(folder) / "ours"),
            GPTSampleOptions(EOD, **chosen),
        )
        assert_same_indexes(ours, reference)
        wanted = {"tokens", "labels", "loss_mask"}
        wanted |= {"position_ids"} if flags[1] else set()
        wanted |= {"attention_mask"} if flags[2] else set()
        for i in range(len(ours)):
            assert set(with_megatrons_mask(ours[i])) == wanted
            # without flags Megatron keeps the first sample's loss mask, its padding included, for all that come later
            assert_equal(with_megatrons_mask(ours[i]), (reference if any(flags) else megatrons())[i], wanted)


def with_megatrons_mask(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The sample with Megatron's `attention_mask` [1, T, T], true where a token must not look, for `segment_ids`."""
    arrays = dict(sample)
    if "segment_ids" in arrays:
        segment = arrays.pop("segment_ids")
        ahead = np.triu(np.ones((len(segment), len(segment)), bool), 1)
        arrays["attention_mask"] = (ahead | (segment[:, None] != segment))[None]
    return arrays


def assert_same_indexes(ours: GPTDataset, reference: Any) -> None:
    mine = ours._indices
    assert np.array_equal(mine.document, reference.document_index)
    assert np.array_equal(mine.sample, reference.sample_index)
    assert np.array_equal(mine.shuffle, reference.shuffle_index)
    assert [a.dtype for a in (mine.document, mine.sample, mine.shuffle)] == [
        a.dtype for a in (reference.document_index, reference.sample_index, reference.shuffle_index)
    ]


@some
@given(
    first=st.lists(sequence, min_size=3, max_size=12).map(lambda texts: [[text] for text in texts]),
    second=st.lists(sequence, min_size=3, max_size=12).map(lambda texts: [[text] for text in texts]),
    weights=st.one_of(st.none(), st.tuples(st.floats(0.05, 5), st.floats(0.05, 5))),
    per_split=st.booleans(),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 10)),
    seed=st.integers(0, 2**31),
)
def test_blends_of_splits(
    first: list[list[list[int]]],
    second: list[list[list[int]]],
    weights: tuple[float, float] | None,
    per_split: bool,
    sizes: tuple[int, int],
    seed: int,
):
    with tempfile.TemporaryDirectory() as folder:
        prefixes = [write(Path(folder) / name, documents) for name, documents in (("a", first), ("b", second))]
        paths = prefixes if weights is None else [str(weights[0]), prefixes[0], str(weights[1]), prefixes[1]]
        blend = (prefixes, list(weights) if weights else None)
        where = {"blend_per_split": [blend, blend, None]} if per_split else {"blend": blend, "split": "2,1"}
        config = theirs("gpt_dataset").GPTDatasetConfig(
            random_seed=seed, sequence_length=3, tokenizer=StreamTokenizer(), reset_position_ids=False,
            reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False, **where,
        )  # fmt: skip
        named = {"train_paths": paths, "valid_paths": paths} if per_split else {"paths": paths, "split": "2,1"}
        section = GPTData.model_validate({"seq_length": 3, **named})
        try:
            ours = build_splits(section, samples=(*sizes, 0), seed=seed, cache_dir=Path(folder) / "cache")
        except MtError:  # asked of too small corpora, as test_gpt_splits.py has it; Megatron fails in other ways
            reject()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = (
                theirs("blended_megatron_dataset_builder")
                .BlendedMegatronDatasetBuilder(theirs("gpt_dataset").GPTDataset, [*sizes, 0], lambda: True, config)
                .build()
            )
        for mine, reference in ((ours.train, built[0]), (ours.valid, built[1])):
            assert mine is not None
            assert len(mine) == len(reference)
            for i in range(len(mine)):
                names = {"dataset_id", "tokens"}
                assert_equal(mine[i], reference[i], names)


def test_the_mock_corpus(tmp_path: Path):
    config = theirs("gpt_dataset").GPTDatasetConfig(
        random_seed=7, sequence_length=512, tokenizer=StreamTokenizer(),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    low = theirs("gpt_dataset").MockGPTDataset.build_low_level_dataset(None, config)
    sequences = MockSequences(eod=EOD, vocab_size=1000)
    assert np.array_equal(sequences.lengths, low.sequence_lengths)
    reference = theirs("gpt_dataset").MockGPTDataset(
        low, None, np.arange(33_333, dtype=np.int32), 50, theirs("utils").Split.train, config
    )
    ours = build_gpt_dataset(
        sequences, IndexRequest(range(33_333), 50, 512, 7), IndexCache(tmp_path), GPTSampleOptions(EOD)
    )
    assert_same_indexes(ours, reference)
    for i in range(20):
        assert_equal(ours[i], reference[i], {"tokens", "labels", "loss_mask"})


sentences = st.lists(st.integers(5, 19), min_size=1, max_size=9)
books = st.lists(st.lists(sentences, min_size=1, max_size=6), min_size=1, max_size=5)
masking_cases = st.builds(
    dict,
    masking_probability=st.sampled_from([0.05, 0.15, 0.3, 0.6]),
    masking_max_ngram=st.integers(1, 4),
    masking_do_full_word=st.booleans(),
    masking_use_longer_ngrams=st.booleans(),
)
shapes = st.sampled_from([(False, False), (True, False), (False, True)])
"""Geometric runs, and permutation."""
PIECES = WordPieceGroups(frozenset((2, 3)), frozenset((7, 10, 12, 17)))


def masking_settings(settings: dict[str, Any], shape: tuple[bool, bool]) -> tuple[MaskingConfig, dict[str, Any]]:
    ours = MaskingConfig(
        mask_prob=settings["masking_probability"],
        max_ngram=settings["masking_max_ngram"],
        full_words=settings["masking_do_full_word"],
        longer_ngrams=settings["masking_use_longer_ngrams"],
        geometric=shape[0],
        permute=shape[1],
    )
    reference = {"masking_use_geometric_distribution": shape[0], "masking_do_permutation": shape[1]}
    return ours, settings | reference


def reference_item(reference: Any, index: int, seed: int) -> Mapping[str, Any]:
    """Megatron's sample, with its global generator, which permuting draws from, as the sample's own begins.

    Megatron fills types and masks up with the id of the padding, which is 0 in BERT's and T5's vocabularies.
    """
    np.random.seed((seed + index) % 2**32)
    return {name: np.where(np.asarray(value) == NO_ID, 0, value) for name, value in reference[index].items()}


def reference_dataset(kind: Any, config: Any, prefix: str, documents: int, samples: int) -> Any:
    return kind(
        theirs("indexed_dataset").IndexedDataset(prefix),
        prefix,
        np.arange(documents, dtype=np.int32),
        samples,
        theirs("utils").Split.train,
        config,
    )


@some
@given(
    documents=books,
    settings=masking_cases,
    shape=shapes,
    two_parts=st.booleans(),
    seq_length=st.integers(8, 40),
    short_prob=st.sampled_from([0.1, 0.5]),
    seed=st.integers(0, 2**31 - 2),
)
def test_bert_samples(
    documents: list[list[list[int]]],
    settings: dict[str, Any],
    shape: tuple[bool, bool],
    two_parts: bool,
    seq_length: int,
    short_prob: float,
    seed: int,
):
    ours, reference_settings = masking_settings(settings, shape)
    with tempfile.TemporaryDirectory() as folder:
        reader = IndexedReader(write(Path(folder) / "c", documents))
        gathering = SentenceSampling(seq_length - 3, 2 if two_parts else 1, short_prob, seed, 12)
        mapping = build_sentence_mapping(Sentences(reader.lengths, reader.documents), gathering)
        if not len(mapping):
            return
        config = theirs("bert_dataset").BERTMaskedWordPieceDatasetConfig(
            random_seed=seed, sequence_length=seq_length, blend=([reader.prefix], None), split="1",
            tokenizer=ToyTokenizer(), short_sequence_probability=short_prob, classification_head=two_parts,
            path_to_cache=str(Path(folder) / "reference"), **reference_settings,
        )  # fmt: skip
        reference = reference_dataset(
            theirs("bert_dataset").BERTMaskedWordPieceDataset, config, reader.prefix, len(documents), 12
        )
        ids = BERTIds(2, 3, 4, np.arange(40))
        dataset = BERTDataset(SentenceSamples(reader, mapping, seed), ids, PIECES, ours, seq_length, two_parts)
        assert len(dataset) == len(reference)
        for i in range(len(dataset)):
            expected = reference_item(reference, i, seed)
            assert list(dataset[i]) == list(expected)
            assert_equal(dataset[i], expected, set(expected))


@some
@given(
    documents=books,
    settings=masking_cases,
    shape=shapes,
    seq_length=st.integers(8, 40),
    seed=st.integers(0, 2**31 - 2),
)
def test_t5_samples(
    documents: list[list[list[int]]], settings: dict[str, Any], shape: tuple[bool, bool], seq_length: int, seed: int
):
    ours, reference_settings = masking_settings(settings, shape)
    with tempfile.TemporaryDirectory() as folder:
        reader = IndexedReader(write(Path(folder) / "c", documents))
        mapping = build_sentence_mapping(
            Sentences(reader.lengths, reader.documents), SentenceSampling(seq_length - 2, 1, 0.1, seed, 12)
        )
        config = theirs("t5_dataset").T5MaskedWordPieceDatasetConfig(
            random_seed=seed, sequence_length=seq_length, sequence_length_decoder=60, blend=([reader.prefix], None),
            split="1", tokenizer=ToyTokenizer(), short_sequence_probability=0.1,
            path_to_cache=str(Path(folder) / "reference"), **reference_settings,
        )  # fmt: skip
        reference = reference_dataset(
            theirs("t5_dataset").T5MaskedWordPieceDataset, config, reader.prefix, len(documents), 12
        )
        ids = T5Ids(20, 21, 4, tuple(range(22, 40)))
        dataset = T5Dataset(SentenceSamples(reader, mapping, seed), ids, PIECES, ours, seq_length, 60)
        assert len(dataset) == len(reference)
        for i in range(len(dataset)):
            try:
                mine = dataset[i]
            except MtError:
                with pytest.raises(IndexError):
                    reference_item(reference, i, seed)
                continue
            expected = reference_item(reference, i, seed)
            assert list(mine) == list(expected)
            assert_equal(mine, expected, set(expected))
