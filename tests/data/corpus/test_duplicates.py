"""`mt data openwebtext find-duplicates`, `group-duplicates` and `remove-duplicates`."""

from pathlib import Path

import pytest

from data.corpus.conftest import read_records, write_records
from mt_core.errors import MtError
from mt_data.corpus.duplicates import (
    DuplicateSearch,
    compute_jaccard,
    compute_signature,
    find_duplicates,
    make_shingles,
)
from mt_data.corpus.groups import DocumentForest, group_duplicates, remove_duplicates

ENGLISH = "The library is open to everyone who lives in the town, and most of its books may be taken home. "
FRENCH = "La bibliothèque est ouverte à tous les habitants de la ville, et la plupart des livres peuvent sortir. "


def test_shingles_and_their_similarity():
    assert make_shingles("abcdefg") == {"abcde", "bcdef"}  # the last is left out
    a, b = set("abcd"), set("cdefgh")
    assert [compute_jaccard(a, b, d) for d in ("union", "min", "max")] == [2 / 8, 2 / 4, 2 / 6]
    assert compute_jaccard(set(), a) == 0


def test_signatures_estimate_the_similarity():
    a, b = ENGLISH * 3 + "x" * 40 + FRENCH, ENGLISH * 3 + "y" * 40 + FRENCH
    equal = compute_signature(a, seeds=1000, seed=1) == compute_signature(b, seeds=1000, seed=1)
    assert equal.mean() == pytest.approx(
        compute_jaccard(make_shingles(a), make_shingles(b)), abs=0.05
    )  # five standard deviations


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    other = "Quite another text, on ships and the sea, with nothing in common but the odd letter here and there."
    records = [
        {"url": "a", "text": ENGLISH * 2 + FRENCH},
        {"url": "b", "text": other},
        {"url": "a-copy", "text": ENGLISH * 2 + FRENCH},
        {"url": "a-changed", "text": ENGLISH * 2 + FRENCH.replace("ville", "cité")},
        {"url": "empty", "text": ""},
        {"url": "empty too", "text": ""},
    ]
    return write_records(tmp_path / "copies.jsonl", *records)


def test_duplicates_are_found_grouped_and_removed(copies: Path, tmp_path: Path):
    counts = find_duplicates([copies], tmp_path / "found", DuplicateSearch(rounds=-1))
    assert counts["records"] == 6
    pairs = {
        (main, *other) for line in read_records(tmp_path / "found") for main, others in line.items() for other in others
    }
    assert pairs >= {("a", "a-copy"), ("a", "a-changed")}
    assert not any(name.startswith(("b", "empty")) for pair in pairs for name in pair)
    assert group_duplicates(tmp_path / "found", tmp_path / "groups") == {"groups": 1, "documents": 3}
    assert read_records(tmp_path / "groups") == [{"0": ["a", "a-copy", "a-changed"]}]
    counts = remove_duplicates([copies], tmp_path / "groups", tmp_path / "out")
    assert counts == {"records": 6, "kept": 4, "duplicates": 2, "written": 4}
    assert [record["url"] for record in read_records(tmp_path / "out")] == ["a", "b", "empty", "empty too"]


def test_input_in_several_files_is_one_corpus(copies: Path, tmp_path: Path):
    lines = copies.read_text().splitlines(keepends=True)
    (tmp_path / "1").write_text("".join(lines[:2]))
    (tmp_path / "2").write_text("".join(lines[2:]).rstrip("\n"))
    find_duplicates([copies], tmp_path / "whole", DuplicateSearch(), workers=2)
    find_duplicates([tmp_path / "1", tmp_path / "2"], tmp_path / "parts", DuplicateSearch())
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes() != b""


def test_groups_are_transitive():
    forest = DocumentForest()
    joined = [forest.link(*pair) for pair in [("a", "b"), ("c", "d"), ("d", "b"), ("a", "c"), ("e", "e")]]
    assert joined == [True, True, True, False, False]
    assert forest.groups() == [["a", "b", "c", "d"]]


def test_what_the_duplicate_steps_refuse(copies: Path, tmp_path: Path):
    with pytest.raises(MtError, match="--num-seeds: 100 is no multiple of --num-bands 7; one that is"):
        find_duplicates([copies], tmp_path / "out", DuplicateSearch(bands=7))
    copies.rename(tmp_path / "copies.jsonl.gz")
    with pytest.raises(MtError, match="is compressed, but its texts are read in any order; decompress it first"):
        find_duplicates([tmp_path / "copies.jsonl.gz"], tmp_path / "out", DuplicateSearch())
    bad = write_records(tmp_path / "bad", {"a": 1})
    with pytest.raises(MtError, match="bad:1: is no line of duplicates"):
        group_duplicates(bad, tmp_path / "out")
    with pytest.raises(MtError, match="bad:1: is no group"):
        remove_duplicates([bad], bad, tmp_path / "out")
