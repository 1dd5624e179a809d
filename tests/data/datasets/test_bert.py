"""BERT samples from files, from the golden example of docs/specs/data.md §5.2 (made by running Megatron)."""

from pathlib import Path

import numpy as np
import pytest

from mt_core.contracts import Dataset
from mt_core.errors import MtError
from mt_core.plugins import component
from mt_data.blending.blend import blend_by_weights
from mt_data.config import BERTData
from word_pieces import toy_corpus, toy_tokenizer


def section(tmp_path: Path, **changes: object) -> BERTData:
    values = {"seq_length": 16, "split": "1", "mask_prob": 0.3, "paths": (toy_corpus(tmp_path),)}
    return BERTData.model_validate({**values, "tokenizer": toy_tokenizer(tmp_path), **changes})


def train(tmp_path: Path, wanted: int | None = 4, **changes: object) -> Dataset:
    build = component("dataset", "bert")
    config = section(tmp_path, **changes)
    dataset = build(config, samples=(wanted, 0, 0), seed=1234, cache_dir=tmp_path / "cache").train
    assert dataset is not None
    return dataset


def labels(sample: dict[str, np.ndarray]) -> dict[int, int]:
    return {n: label for n, label in enumerate(sample["labels"].tolist()) if label != -1}


def test_the_golden_samples(tmp_path: Path):
    dataset = train(tmp_path)
    assert len(dataset) == 4
    first, second = dict(dataset[0]), dict(dataset[1])
    assert first["text"].tolist() == [2, 16, 17, 14, 3, 4, 6, 7, 8, 9, 10, 4, 5, 4, 3, 0]
    assert labels(first) == {5: 5, 11: 11, 13: 13}
    assert first["types"].tolist() == [0] * 5 + [1] * 10 + [0]
    assert first["padding_mask"].tolist() == [1] * 15 + [0]
    assert first["loss_mask"].tolist() == [int(n in (5, 11, 13)) for n in range(16)]
    assert first["is_random"] == 1
    assert second["text"].tolist() == [2, 5, 6, 7, 4, 9, 10, 11, 4, 15, 3, 16, 17, 14, 3, 0]
    assert labels(second) == {4: 8, 8: 5, 9: 13}
    assert second["is_random"] == 0


def test_without_a_classification_head_all_sentences_are_one_part(tmp_path: Path):
    dataset = train(tmp_path, None, classification_head=False)
    assert len(dataset) == 3  # single sentences count too
    assert all(not dataset[i]["types"].any() and dataset[i]["is_random"] == 0 for i in range(3))


def test_a_sample_does_not_depend_on_those_read_before(tmp_path: Path):
    dataset = train(tmp_path)
    again = train(tmp_path)
    last = dataset[3]
    for i in range(4):
        for name, array in again[i].items():
            assert np.array_equal(array, dataset[i][name])
    assert np.array_equal(last["text"], dataset[3]["text"])


def test_a_blend_of_corpora(tmp_path: Path):
    paths = ("1", toy_corpus(tmp_path), "3", toy_corpus(tmp_path, [[[5, 6], [8, 9]], [[11, 13], [14]]], "other"))
    dataset = train(tmp_path, 8, paths=paths)
    assert [int(dataset[i]["dataset_id"]) for i in range(8)] == blend_by_weights([1, 3], 8)[0].tolist()


def test_shares_of_the_split_are_documents(tmp_path: Path):
    build = component("dataset", "bert")
    built = build(
        section(tmp_path, split="2,1", classification_head=False),
        samples=(None, None, 0),
        seed=1,
        cache_dir=tmp_path / "cache",
    )
    assert (len(built.train), len(built.valid)) == (2, 1)


def test_an_empty_split(tmp_path: Path):
    build = component("dataset", "bert")
    with pytest.raises(MtError, match=r"the valid split of .*/toy: is empty: 3 documents, split '1'"):
        build(section(tmp_path), samples=(4, 4, 0), seed=1, cache_dir=tmp_path / "cache")


def test_documents_that_give_no_sample_are_an_error_not_an_endless_loop(tmp_path: Path):
    paths = (toy_corpus(tmp_path, [[[5, 6]], [[8]]], "single"),)
    with pytest.raises(MtError, match=r"the train split of .*/single: gives no samples: 2 documents"):
        train(tmp_path, 4, paths=paths)


def test_a_tokenizer_is_needed(tmp_path: Path):
    with pytest.raises(MtError, match=r"data\.tokenizer: is not given; bert data needs one"):
        train(tmp_path, tokenizer=None)


def test_geometric_runs_and_permutation_exclude_each_other(tmp_path: Path):
    with pytest.raises(ValueError, match="permute does not go with geometric; turn one off"):
        section(tmp_path, geometric=True, permute=True)
