"""ICT: block mapping from the golden example of docs/specs/data.md §5.4, legacy splits, and samples from files."""

from pathlib import Path

import numpy as np
import pytest

from mt_core.errors import MtError
from mt_core.plugins import component
from mt_data.blending.build import Splits
from mt_data.config import ICTData
from mt_data.config.split import compute_legacy_ranges
from mt_data.datasets.ict import ICTDataset
from mt_data.datasets.masking.build import flatten
from mt_data.datasets.masking.sentence_mapping import Sentences, SentenceSampling, build_block_mapping
from word_pieces import DOCUMENTS, toy_corpus, toy_tokenizer

TITLES = [[[15]], [[19, 18]], [[14]]]


def splits(tmp_path: Path, samples: tuple[int | None, int | None, int | None] = (3, 0, 0), **changes: object) -> Splits:
    values = {"seq_length": 24, "split": "1", "paths": (toy_corpus(tmp_path),)}
    titles = {"titles": toy_corpus(tmp_path, TITLES, "titles"), "tokenizer": toy_tokenizer(tmp_path)}
    config = ICTData.model_validate({**values, **titles, **changes})
    return component("dataset", "ict")(config, samples=samples, seed=1234, cache_dir=tmp_path / "cache")


def sample(tmp_path: Path, **changes: object) -> tuple[dict[str, np.ndarray], list[list[int]], list[int]]:
    """A sample without its padding, the sentences of its block, and its title."""
    dataset = splits(tmp_path, **changes).train
    assert isinstance(dataset, ICTDataset)
    item = dict(dataset[0])
    first, behind, document, _ = item["block_data"].tolist()
    sentences = [sentence for document in DOCUMENTS for sentence in document]
    return item, sentences[first:behind], TITLES[document][0]


def text(item: dict[str, np.ndarray], name: str) -> list[int]:
    return item[f"{name}_tokens"][item[f"{name}_pad_mask"] == 1].tolist()


def test_the_golden_blocks():
    lengths = np.array([5, 4, 6, 8, 3, 5, 4, 6, 2, 7, 6, 5, 4, 3], np.int32)
    sentences = Sentences(lengths, np.array([0, 3, 4, 9, 9, 14]))
    rows = build_block_mapping(sentences, np.array([2, 1, 3, 1, 2]), SentenceSampling(15, 2, 0, 1234, None))
    assert rows.tolist() == [[4, 7, 2, 1], [0, 3, 0, 0], [7, 9, 2, 2], [11, 14, 4, 4], [9, 11, 4, 3]]


@pytest.mark.parametrize(
    ("split", "count", "bounds"),
    [("969,30,1", 7, [0, 7, 7, 7]), ("1,1,1", 5, [0, 1, 3, 5]), ("90/10", 5, [0, 5, 5, 5])],
)
def test_the_legacy_splits(split: str, count: int, bounds: list[int]):
    ranges = compute_legacy_ranges(split, count)
    assert [ranges[0].start, *(part.stop for part in ranges)] == bounds


def test_the_query_is_taken_out_of_its_block(tmp_path: Path):
    item, sentences, title = sample(tmp_path, query_in_block_prob=0)
    query = text(item, "query")[1:-1]
    assert query in sentences
    sentences.remove(query)
    assert text(item, "query") == [2, *query, 3]
    assert text(item, "context") == [2, *title, 3, *flatten(sentences), 3]


def test_or_stays_in_it(tmp_path: Path):
    item, sentences, title = sample(tmp_path, query_in_block_prob=1)
    assert text(item, "query")[1:-1] in sentences
    assert text(item, "context") == [2, *title, 3, *flatten(sentences), 3]


def test_masks_are_outer_products_of_real_ids(tmp_path: Path):
    item, _, _ = sample(tmp_path)
    real = item["query_tokens"] >= 1
    assert item["query_mask"].shape == (24, 24)
    assert np.array_equal(item["query_mask"], np.outer(real, real))


def test_without_titles(tmp_path: Path):
    item, sentences, _ = sample(tmp_path, titles=None, query_in_block_prob=1)
    assert text(item, "context") == [2, *flatten(sentences), 3]


def test_titles_follow_their_documents_into_the_validation_split(tmp_path: Path):
    valid = splits(tmp_path, (0, None, 0), split="1,2").valid
    assert valid is not None
    assert text(dict(valid[0]), "context")[1:3] == [14, 3]


def test_an_empty_split(tmp_path: Path):
    with pytest.raises(MtError, match=r"the valid split of .*/toy: is empty: 0 documents, split '1', give no block"):
        splits(tmp_path, (3, 3, 0))


def test_titles_of_other_documents(tmp_path: Path):
    with pytest.raises(MtError, match=r"few: has 2 titles, .*/toy has 3 documents; one title for each document"):
        splits(tmp_path, titles=toy_corpus(tmp_path, TITLES[:2], "few"))


def test_one_corpus_only(tmp_path: Path):
    with pytest.raises(MtError, match=r"data\.paths: 2 paths; ict data has one, without a weight"):
        splits(tmp_path, paths=("1", toy_corpus(tmp_path)))
