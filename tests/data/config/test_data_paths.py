"""The ways to name corpora (docs/specs/data.md §4.1), and what is wrong with them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mt_core.errors import MtError
from mt_data.blending.build import Splits
from mt_data.config import GPTData
from mt_data.config.paths import WeightedPaths, resolve_split_paths
from mt_data.config.rules import data_problems
from mt_data.datasets.gpt.dataset import build_splits

Corpus = Callable[[str, Sequence[int]], str]


def built(tmp_path: Path, samples: tuple[int | None, int | None, int | None], **section: object) -> Splits:
    config = GPTData.model_validate({"seq_length": 4, **section})
    return build_splits(config, samples=samples, seed=1234, cache_dir=tmp_path / "cache")


def owners(dataset: object) -> set[int]:
    return {token // 100 for i in range(len(dataset)) for token in dataset[i]["tokens"].tolist()}  # pyright: ignore


def test_each_split_has_its_own_corpora_whole(corpus: Corpus, tmp_path: Path):
    train, valid = corpus("train", (9,) * 3), corpus("valid", (9, 0, 9))
    splits = built(tmp_path, (None, None, None), train_paths=(train,), valid_paths=(valid,))
    assert owners(splits.train) == {1, 2, 3}
    assert owners(splits.valid) == {1, 3}
    assert splits.test is None


def test_a_single_weighted_corpus_of_one_split_is_no_blend(corpus: Corpus, tmp_path: Path):
    prefix = corpus("a", (9,) * 3)
    own = built(tmp_path, (6, 0, 0), train_paths=("0.5", prefix)).train
    shared = built(tmp_path, (6, 0, 0), paths=("0.5", prefix), split="1").train
    assert own is not None
    assert shared is not None
    assert "dataset_id" not in own[0]
    assert next(iter(shared[0])) == "dataset_id"
    assert shared[0]["dataset_id"] == 0


def test_a_split_without_corpora_that_is_wanted(corpus: Corpus, tmp_path: Path):
    with pytest.raises(MtError, match=r"data\.test_paths: names no data, 3 test samples are wanted"):
        built(tmp_path, (1, 0, 3), train_paths=(corpus("a", (9,)),))


def test_paths_from_a_file(corpus: Corpus, tmp_path: Path):
    a, b = corpus("a", (9,) * 3), corpus("b", (9,) * 3)
    (tmp_path / "paths.txt").write_text(f"0.3 {a}\n0.7\t{b}\n")
    config = GPTData(seq_length=4, paths_file=str(tmp_path / "paths.txt"))
    assert resolve_split_paths(config).splits == (WeightedPaths((a, b), (0.3, 0.7), "data.paths_file"),) * 3


def test_paths_of_each_split_from_a_json_file(corpus: Corpus, tmp_path: Path):
    a, b = corpus("a", (9,) * 3), corpus("b", (9,) * 3)
    (tmp_path / "paths.json").write_text(json.dumps({"train": [0.3, a, "0.7", b], "valid": f"{a} {b} ", "test": None}))
    split_paths = resolve_split_paths(GPTData(seq_length=4, split_paths_file=str(tmp_path / "paths.json")))
    where = "data.split_paths_file"
    assert split_paths.splits == (WeightedPaths((a, b), (0.3, 0.7), where), WeightedPaths((a, b), None, where), None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is not JSON"),
        ('{"train": []}', "does not hold the three splits; an object with keys train, valid and test"),
        ('{"train": 3, "valid": null, "test": null}', "train is 3; a list, a string or null"),
    ],
)
def test_a_wrong_json_file(tmp_path: Path, content: str, message: str):
    (tmp_path / "paths.json").write_text(content)
    with pytest.raises(MtError, match=message):
        resolve_split_paths(GPTData(seq_length=4, split_paths_file=str(tmp_path / "paths.json")))


def test_a_file_of_paths_that_is_missing(tmp_path: Path):
    (problem,) = data_problems(GPTData(seq_length=4, paths_file=str(tmp_path / "no.txt")))
    assert "data.paths_file: " in str(problem)
    assert "no.txt cannot be read" in str(problem)


def test_two_ways_at_once():
    (problem,) = data_problems(GPTData(seq_length=4, paths=("a",), train_paths=("b",)))
    assert str(problem).startswith(
        "data.paths: data is named twice, in paths and train_paths; one of paths, paths_file"
    )


def test_a_split_of_corpora_that_are_not_split():
    with pytest.raises(ValueError, match="split divides `paths`; with train_paths, valid_paths or test_paths it must"):
        GPTData(seq_length=4, train_paths=("a",), split="90,10")


def test_missing_files_name_their_setting(corpus: Corpus, tmp_path: Path):
    config = GPTData(seq_length=4, train_paths=(corpus("a", (9,)),), valid_paths=(str(tmp_path / "b"),))
    (problem,) = data_problems(config)
    assert str(problem).startswith("data.valid_paths: no file")


@pytest.mark.parametrize("weights", [("0", "0"), ("-1", "1")])
def test_weights_that_sum_to_nothing(corpus: Corpus, tmp_path: Path, weights: tuple[str, str]):
    paths = (weights[0], corpus("a", (9,)), weights[1], corpus("b", (9,)))
    with pytest.raises(MtError, match=r"data\.paths: weight .*; weights are finite and greater than 0"):
        built(tmp_path, (1, 0, 0), paths=paths)
