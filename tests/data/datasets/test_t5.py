"""T5 samples from files, from the golden example of docs/specs/data.md §5.3 (made by running Megatron)."""

from pathlib import Path

import pytest

from mt_core.contracts import Dataset
from mt_core.errors import MtError
from mt_core.plugins import component
from mt_data.config import T5Data
from word_pieces import toy_corpus, toy_tokenizer


def train(tmp_path: Path, **changes: object) -> Dataset:
    values = {"seq_length": 20, "decoder_seq_length": 12, "split": "1", "mask_prob": 0.3}
    corpus = {"paths": (toy_corpus(tmp_path),), "tokenizer": toy_tokenizer(tmp_path)}
    config = T5Data.model_validate({**values, **corpus, **changes})
    dataset = component("dataset", "t5")(config, samples=(4, 0, 0), seed=1234, cache_dir=tmp_path / "cache").train
    assert dataset is not None
    return dataset


def test_the_golden_sample(tmp_path: Path):
    dataset = train(tmp_path)
    assert len(dataset) == 6
    assert {name: array.tolist() for name, array in dataset[0].items()} == {
        "text_enc": [22, 13, 16, 10, 14, 8, 9, 12, 11, 18, 8, 23, 24, 13, 25, 0, 0, 0, 0, 0],
        "text_dec": [20, 22, 5, 23, 14, 24, 19, 25, 9, 10, 0, 0],
        "labels": [22, 5, 23, 14, 24, 19, 25, 9, 10, 21, -1, -1],
        "loss_mask": [1] * 10 + [0] * 2,
        "truncated": 0,
        "enc_mask": [1] * 15 + [0] * 5,
        "dec_mask": [1] * 10 + [0] * 2,
    }


def test_too_few_sentinels(tmp_path: Path):
    tokenizer = toy_tokenizer(tmp_path).model_copy(update={"vocab_extra_ids": 1})
    with pytest.raises(MtError, match="has 1 sentinels, a sample has 4 masked runs; a larger .*vocab_extra_ids"):
        train(tmp_path, tokenizer=tokenizer)[0]


def test_a_decoder_that_is_too_short(tmp_path: Path):
    with pytest.raises(MtError, match=r"data\.decoder_seq_length: 9, a sample has 10 tokens; at least 10"):
        train(tmp_path, decoder_seq_length=9)[0]
