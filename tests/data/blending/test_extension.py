"""A plan that grows keeps the samples it began with, in their order, whatever the kind of dataset."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from mt_core.contracts import Dataset
from mt_core.plugins import component
from mt_data.blending.extension import ExtendedDataset, Extension, extend_dataset
from mt_data.config import GPTData, MockData, SFTData, TokenizerConfig
from mt_data.config.union import data_union
from mt_data.datasets.gpt.dataset import build_splits
from mt_data.datasets.mock import build_splits as build_mock
from mt_data.datasets.sft.dataset import build_splits as build_sft
from word_pieces import toy_corpus, toy_tokenizer

Corpus = Callable[[str, Sequence[int]], str]
LENGTHS = (20, 31, 50)
"""25 samples of 4 tokens in an epoch."""


def read(dataset: Dataset | None, first: int = 0, stop: int | None = None) -> list[list[int]]:
    assert dataset is not None
    return [np.asarray(dataset[i]["tokens"]).tolist() for i in range(first, len(dataset) if stop is None else stop)]


@pytest.fixture
def build(corpus: Corpus, tmp_path: Path) -> Callable[..., Dataset | None]:
    """The training samples of two corpora, or of the first alone, by plan."""
    prefixes = corpus("a", LENGTHS), corpus("b", (70, 11, 23, 40))

    def make(*planned: int, paths: Sequence[str] = prefixes[:1]) -> Dataset | None:
        config = GPTData(paths=tuple(paths), split="1", seq_length=4)
        samples = planned[0] if len(planned) == 1 else planned
        return build_splits(config, samples=(samples, 0, 0), seed=1, cache_dir=tmp_path / "cache").train

    make.blend = ("0.3", prefixes[0], "0.7", prefixes[1])  # pyright: ignore[reportFunctionMemberAccess]
    return make


def test_more_epochs_alone_would_change_the_order_of_the_samples_before(build):
    assert read(build(20), 0, 20) != read(build(60), 0, 20), "so a plan is kept"


def test_samples_beyond_the_planned_epochs_follow_them_and_each_epoch_is_read_whole(build):
    planned, grown = read(build(20)), read(build(20, 60))
    assert len(planned) == 25
    assert len(grown) >= 60
    assert grown[:25] == planned
    assert grown[25:50] != planned, "the next epochs are shuffled anew"
    tokens = sorted(token for sample in grown[25:] for token in sample)
    assert [tokens.count(token) for token in set(tokens)].count(2) > 90, "two more epochs of the 101 tokens"


def test_a_plan_that_grows_within_its_epoch_changes_nothing(build):
    assert read(build(20, 24)) == read(build(20))
    assert read(build(30, 49)) == read(build(30)), "though 49 samples at once would be shuffled otherwise"
    assert read(build(49)) != read(build(30))


def test_a_plan_grows_again_and_again(build):
    assert read(build(20, 60, 90))[: len(build(20, 60))] == read(build(20, 60))


def test_each_corpus_of_a_blend_goes_on_where_it_was(build):
    blend = build(30, 100, paths=build.blend)
    before, grown = read(build(30, paths=build.blend), 0, 30), read(blend, 0, 100)
    assert grown[:30] == before
    ids = [int(blend[i]["dataset_id"]) for i in range(100)]
    of_first = [sample for number, sample in zip(ids, grown, strict=True) if number == 0]
    assert len(of_first) == pytest.approx(30, abs=1)
    assert of_first == read(build(10, 31, paths=build.blend[1:2]), 0, len(of_first)), "its shares, half a percent more"


def test_conversations_go_on_with_the_next_line(tmp_path):
    lines = [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": w}]} for w in "abcde"]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", *"abcdexuser", "\n"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="x"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.add_special_tokens(words[:3])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    hf = TokenizerConfig(type="HuggingFaceTokenizer", model=str(tmp_path / "tokenizer.json"))
    config = SFTData(paths=(str(tmp_path / "chat.jsonl"),), split="1", seq_length=64, tokenizer=hf)
    options = {"seed": 1, "cache_dir": tmp_path}
    at_once = build_sft(config, samples=(12, 0, 0), **options).train
    assert len(set(map(tuple, read(at_once)))) == 5
    assert read(build_sft(config, samples=((7, 12), 0, 0), **options).train) == read(at_once)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bert", {"seq_length": 16}),
        ("t5", {"seq_length": 20, "decoder_seq_length": 12}),
        ("ict", {"seq_length": 24}),
    ],
)
def test_samples_of_sentences_are_extended_by_whole_epochs(tmp_path, kind, options):
    values = {"kind": kind, "split": "1", "paths": (toy_corpus(tmp_path),), "tokenizer": toy_tokenizer(tmp_path)}
    config = TypeAdapter(data_union()).validate_python({**values, **options})

    def build(samples: int | tuple[int, ...]) -> Dataset:
        splits = component("dataset", kind)(config, samples=(samples, 0, 0), seed=1234, cache_dir=tmp_path / "cache")
        return splits.train

    def read_all(dataset: Dataset) -> list[dict[str, list[int]]]:
        return [{name: np.asarray(v).tolist() for name, v in dataset[i].items()} for i in range(len(dataset))]

    epoch, before, grown = len(build(1)), read_all(build(3)), read_all(build((3, 20)))
    assert grown[: len(before)] == before
    assert len(grown) >= 20
    assert len(grown) % epoch == 0 or kind != "ict"
    assert grown[len(before) : 2 * len(before)] != before
    assert read_all(build((3, 20))) == grown


def test_the_mock_corpus_grows(tmp_path):
    config = MockData(seq_length=16384, tokenizer=TokenizerConfig(type="NullTokenizer", vocab_size=500))
    options = {"seed": 1, "cache_dir": tmp_path}
    before = build_mock(config, samples=(4, 0, 0), **options).train
    assert before is not None
    more = len(before) + 2
    grown = build_mock(config, samples=((4, more), 0, 0), **options).train
    assert isinstance(grown, ExtendedDataset)
    assert read(grown, 0, 4) == read(before, 0, 4)
    assert len(read(grown, len(before), more)) == 2


def test_every_extension_has_an_order_of_its_own():
    seeds = [Extension(number, 0).derive_seed(1234) for number in range(4)]
    assert seeds[0] == 1234
    assert len(set(seeds)) == 4
    assert max(seeds) < 2**32


def test_samples_are_counted_over_all_datasets():
    made = []

    def make(samples: int | None, extension: Extension) -> range:
        made.append((samples, extension))
        return range(100 * extension.number, 100 * extension.number + (samples or 0) + 1)

    dataset = extend_dataset((3, 4, 9), make)  # pyright: ignore[reportArgumentType]
    assert made == [(3, Extension()), (5, Extension(2, 4))]
    assert [dataset[i] for i in range(len(dataset))] == [0, 1, 2, 3, *range(200, 206)]
    with pytest.raises(IndexError):
        dataset[10]
