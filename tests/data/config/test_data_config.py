"""The data section: its splits, its paths, and the problems that are found before anything is read."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mt_core.errors import MtError
from mt_data.config import GPTData, TokenizerConfig
from mt_data.config.paths import WeightedPaths, parse_paths
from mt_data.config.rules import data_problems
from mt_data.config.split import compute_split_ranges

Corpus = Callable[[str, Sequence[int]], str]


@pytest.mark.parametrize(
    ("split", "count", "bounds"),
    [
        ("969,30,1", 1000, [(0, 969), (969, 999), (999, 1000)]),
        ("969, 30, 1", 1000, [(0, 969), (969, 999), (999, 1000)]),
        ("969,30,1", 5, [(0, 5), (5, 5), (5, 5)]),
        ("90,10", 5, [(0, 4), (4, 5), (5, 5)]),
        ("1,1,1", 5, [(0, 2), (2, 3), (3, 5)]),
    ],
)
def test_splits_are_megatrons(split: str, count: int, bounds: list[tuple[int, int]]):
    assert [(r.start, r.stop) for r in compute_split_ranges(split, count)] == bounds


@given(
    shares=st.lists(st.floats(0, 1000).map(lambda x: round(x, 3)), min_size=1, max_size=3).filter(any),
    count=st.integers(0, 10**9),
)
def test_ranges_cover_every_sequence_once_and_equal_numpys(shares: list[float], count: int):
    ranges = compute_split_ranges(",".join(map(str, shares)), count)
    assert ranges[0].start == 0
    assert [r.stop for r in ranges[:-1]] == [r.start for r in ranges[1:]]
    assert ranges[-1].stop == count
    padded = np.array([*shares, 0.0, 0.0][:3])
    normalised = (padded / np.sum(padded)).tolist()
    edges = [0, normalised[0], normalised[0] + normalised[1], normalised[0] + normalised[1] + normalised[2]]
    assert [r.start for r in ranges] == [round(edge * count) for edge in edges[:3]]
    exact = [Fraction(share) / sum(map(Fraction, shares)) * count for share in shares]
    assert all(abs(len(r) - part) <= 1 + count * 1e-12 for r, part in zip(ranges, exact, strict=False))


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "0,0,0", "-1,2", "nan", "inf,1"])
def test_a_bad_split(split: str):
    with pytest.raises(MtError, match=r"data\.split: .*; up to three shares"):
        compute_split_ranges(split, 10)


@pytest.mark.parametrize(
    ("paths", "prefixes", "weights"),
    [
        ((), (), None),
        (("a", "b", "c"), ("a", "b", "c"), None),
        (("a", "b"), ("a", "b"), None),
        (("0.3", "a", "7e-1", " b "), ("a", "b"), (0.3, 0.7)),
        (("1", "2"), ("2",), (1.0,)),
    ],
)
def test_the_grammar_of_paths(paths: tuple[str, ...], prefixes: tuple[str, ...], weights: tuple[float, ...] | None):
    assert parse_paths(paths) == WeightedPaths(prefixes, weights)


@pytest.mark.parametrize("paths", [("1", "p", "x", "q"), ("p", "x", "1", "q")])
def test_weights_on_some_prefixes_only(paths: tuple[str, ...]):
    with pytest.raises(MtError, match=r"data\.paths: .* has a weight before some prefixes only; prefixes only, or"):
        parse_paths(paths)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_a_weight_that_is_none(weight: str):
    with pytest.raises(MtError, match=r"data\.paths: weight .*; weights are finite and greater than 0"):
        parse_paths((weight, "p"))


def test_a_correct_section_has_no_problems(corpus: Corpus):
    config = GPTData(paths=(corpus("a", (5,)),), seq_length=4, tokenizer=TokenizerConfig(type="bytes"))
    assert list(data_problems(config)) == []


def test_all_problems_are_found_at_once(corpus: Corpus, tmp_path: Path):
    corpus("books_text_document", (5,))
    (tmp_path / "vocab.json").touch()
    config = GPTData(
        paths=(str(tmp_path / "book_text_document"),),
        split="1,x",
        seq_length=4,
        tokenizer=TokenizerConfig(
            type="GPT2BPETokeniser",
            vocab_file=str(tmp_path / "vocabs.json"),
            merge_file=str(tmp_path / "no" / "merges.txt"),
        ),
    )
    lines = [str(problem) for problem in data_problems(config)]
    assert [line.split(":")[0] for line in lines] == [
        "data.paths",
        "data.split",
        "data.tokenizer.type",
        "data.tokenizer.vocab_file",
        "data.tokenizer.merge_file",
    ]
    assert "did you mean" in lines[0]
    assert "books_text_document" in lines[0]
    assert "did you mean 'GPT2BPETokenizer'?" in lines[2]
    assert lines[3].endswith(f"did you mean {tmp_path / 'vocab.json'}?")
    assert lines[4].endswith(f"its folder {tmp_path / 'no'} does not exist either")


def test_masking_the_end_of_document_needs_a_tokenizer():
    (problem,) = data_problems(GPTData(seq_length=4, eod_mask_loss=True))
    assert str(problem).startswith("data.eod_mask_loss: is on, but there is no data.tokenizer")


def test_a_missing_file_without_a_similar_name(tmp_path: Path):
    config = GPTData(seq_length=4, tokenizer=TokenizerConfig(type="bytes", model=str(tmp_path / "x")))
    (problem,) = data_problems(config)
    assert str(problem).endswith(f"no file {tmp_path / 'x'}; nothing in {tmp_path} has a name like it")


def test_every_field_is_documented():
    for section in (GPTData, TokenizerConfig):
        undocumented = [name for name, field in section.model_fields.items() if not field.description]
        assert undocumented in ([], ["kind"])
