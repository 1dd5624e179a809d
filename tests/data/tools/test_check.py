"""`mt data check`: everything that is wrong with a pair, at once."""

import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from mt_data.indexed.format import HEADER
from mt_data.indexed.writer import IndexedWriter
from mt_data.tools import check as check_module
from mt_data.tools.check import check_pair

Corpus = Callable[[str, Sequence[int]], str]
LENGTHS_AT = HEADER.size
POINTERS_AT = LENGTHS_AT + 4 * 3
DOCUMENTS_AT = POINTERS_AT + 8 * 3


@pytest.fixture
def pair(corpus: Corpus) -> str:
    """Three documents of 4, 2 and 3 tokens; token j of document i (from 1) is 100 · i + j."""
    return corpus("a", (4, 2, 3))


def overwrite(path: str, at: int, data: bytes) -> None:
    with Path(path).open("r+b") as file:
        file.seek(at)
        file.write(data)


def problems(prefix: str, vocab_size: int | None = None) -> list[str]:
    return [str(problem) for problem in check_pair(prefix, vocab_size=vocab_size).problems]


def test_a_sound_pair(pair: str):
    checked = check_pair(pair, vocab_size=303)
    assert checked.problems == ()
    assert (checked.documents, checked.sequences, checked.tokens, checked.largest) == (3, 3, 9, 302)


def test_an_empty_pair(corpus: Corpus):
    checked = check_pair(corpus("empty", ()))
    assert (checked.problems, checked.documents, checked.tokens, checked.largest) == ((), 0, 0, None)


def test_a_multimodal_index_has_a_byte_a_sequence_more(pair: str):
    with Path(f"{pair}.idx").open("ab") as file:
        file.write(b"\0\1\0")
    assert problems(pair) == []
    with Path(f"{pair}.idx").open("ab") as file:
        file.write(b"\0")
    assert problems(pair) == [f"{pair}.idx: has 4 bytes more than its header promises; preprocess it again"]


@pytest.mark.parametrize(
    ("at", "data", "expected"),
    [
        (LENGTHS_AT + 4, struct.pack("<i", -2), "has a negative length at sequence 1"),
        (POINTERS_AT, struct.pack("<q", 2), "sequence 0 begins at byte 2 of the .bin, not at 0"),
        (POINTERS_AT + 8, struct.pack("<q", 6), "the sequence after 0 does not begin where that one ends, and 1 more"),
        (DOCUMENTS_AT, struct.pack("<q", 1), "document 0 begins at sequence 1, not at 0"),
        (DOCUMENTS_AT + 8, struct.pack("<q", 3), "document 1 ends before it begins"),
        (DOCUMENTS_AT + 24, struct.pack("<q", 2), "its documents end at sequence 2, it has 3 sequences"),
    ],
)
def test_each_rule_of_the_index(pair: str, at: int, data: bytes, expected: str):
    overwrite(f"{pair}.idx", at, data)
    assert any(problem.startswith(f"{pair}.idx: {expected}") for problem in problems(pair)), problems(pair)


def test_a_bin_of_another_size(pair: str):
    with Path(f"{pair}.bin").open("ab") as file:
        file.write(b"\0")
    assert problems(pair) == [f"{pair}.bin: is 19 bytes, the lengths of {pair}.idx add up to 18; preprocess it again"]


def test_an_index_without_documents(tmp_path: Path):
    (tmp_path / "a.idx").write_bytes(HEADER.pack(b"MMIDIDX\0\0", 1, 8, 0, 0))
    (tmp_path / "a.bin").touch()
    assert problems(str(tmp_path / "a")) == [
        f"{tmp_path}/a.idx: has no document bounds, not even the first; preprocess it again"
    ]


@pytest.mark.parametrize(
    ("at", "data", "expected"),
    [
        (0, b"X", "is not an index of token ids"),
        (9, b"\2", "has version 2"),
        (17, b"\x09", "has dtype code 9"),
        (18, b"\xff", "is truncated"),
    ],
)
def test_nothing_behind_a_wrong_header_is_trusted(pair: str, at: int, data: bytes, expected: str):
    overwrite(f"{pair}.idx", at, data)
    (problem,) = problems(pair)
    assert expected in problem


def test_ids_outside_the_vocabulary_are_named_and_counted(pair: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(check_module, "BLOCK_TOKENS", 2)
    allowed = "ids below 201, the vocabulary"
    assert problems(pair, vocab_size=201) == [
        f"{pair}.bin: token id 201 in sequence 1, and 3 more out of range; {allowed}"
    ]


def test_negative_ids(tmp_path: Path):
    with IndexedWriter(tmp_path / "a", np.dtype("int32")) as writer:
        writer.add_documents(np.arange(6), np.array([3, 3]))
    overwrite(str(tmp_path / "a.bin"), 16, struct.pack("<i", -7))
    assert problems(str(tmp_path / "a"), vocab_size=6) == [
        f"{tmp_path}/a.bin: token id -7 in sequence 1; ids of at least 0"
    ]


def mt(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "mt_cli", "data", *args], capture_output=True, text=True)


def test_all_problems_of_all_pairs_are_told_at_once(pair: str, corpus: Corpus, tmp_path: Path):
    good = corpus("good", (2,))
    overwrite(f"{pair}.idx", DOCUMENTS_AT, struct.pack("<q", 1))
    ran = mt("check", pair, good, tmp_path / "gone", "--vocab-size", "257", "--tokenizer-type", "bytes")
    assert ran.returncode == 2
    assert ran.stdout == f"ok: {good}: 1 documents, 2 tokens, ids up to 101\n"
    assert [line.split("; ")[0] for line in ran.stderr.splitlines()] == [
        f"mt: {pair}.idx: document 0 begins at sequence 1, not at 0",
        f"mt: {pair}.bin: token id 300 in sequence 2, and 2 more out of range",
        f"mt: {tmp_path}/gone: no file {tmp_path}/gone.bin and {tmp_path}/gone.idx",
    ]
    assert mt("check", good, "--vocab-size", "102").stderr == ""
