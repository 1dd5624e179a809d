"""The .bin/.idx pair: golden bytes of docs/specs/data.md §1.9, and what a damaged pair says."""

from pathlib import Path

import numpy as np
import pytest

from mt_core.errors import MtError
from mt_data.indexed.format import choose_token_dtype
from mt_data.indexed.reader import IndexedReader
from mt_data.indexed.writer import IndexedWriter

GOLDEN_BIN = bytes.fromhex("010002000300 0201 50c4")
GOLDEN_IDX = bytes.fromhex(
    "4d4d49444944580000 0100000000000000 08 0300000000000000 0400000000000000 03000000 01000000 01000000"
    "0000000000000000 0600000000000000 0800000000000000"
    "0000000000000000 0100000000000000 0100000000000000 0300000000000000"
)


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """Documents: [1, 2, 3]; nothing; two sequences, [258] and [50256]."""
    with IndexedWriter(tmp_path / "golden", choose_token_dtype(50257)) as writer:
        writer.add_documents(np.array([1, 2, 3]), np.array([3, 0]))
        writer.add_document(np.array([258, 50256]), np.array([1, 1]))
    return tmp_path / "golden"


def test_the_bytes_are_megatrons(prefix: Path):
    assert prefix.with_suffix(".bin").read_bytes() == GOLDEN_BIN
    assert prefix.with_suffix(".idx").read_bytes() == GOLDEN_IDX


def test_reading_gives_back_what_was_written(prefix: Path):
    reader = IndexedReader(prefix)
    assert [reader.get(i).tolist() for i in range(len(reader))] == [[1, 2, 3], [258], [50256]]
    assert reader.get(0, 1).tolist() == [2, 3]
    assert reader.get(0, 1, 1).tolist() == [2]
    assert reader.lengths.tolist() == [3, 1, 1]
    assert reader.pointers.tolist() == [0, 6, 8]
    assert reader.documents.tolist() == [0, 1, 1, 3]
    assert (reader.dtype, reader.document_count, reader.token_count) == (np.uint16, 3, 5)


def test_a_multimodal_index_reads_as_text(tmp_path: Path):
    (tmp_path / "m.bin").write_bytes(bytes.fromhex("050000000600000009000000"))
    (tmp_path / "m.idx").write_bytes(
        bytes.fromhex(
            "4d4d49444944580000 0100000000000000 04 0200000000000000 0200000000000000 02000000 01000000"
            "0000000000000000 0800000000000000 0000000000000000 0200000000000000 00 01"
        )
    )
    assert [IndexedReader(tmp_path / "m").get(i).tolist() for i in (0, 1)] == [[5, 6], [9]]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(65499, "uint16"), (65500, "int32"), (65536, "int32"), (None, "int32")]
)
def test_the_dtype_depends_on_the_vocabulary(vocab_size: int | None, dtype: str):
    assert choose_token_dtype(vocab_size).name == dtype


def test_an_id_too_large_for_the_dtype_is_refused_and_nothing_is_left(tmp_path: Path):
    with (
        pytest.raises(MtError, match="token id 70000 does not fit into uint16; ids 0 to 65535"),
        IndexedWriter(tmp_path / "x", np.dtype("uint16")) as writer,
    ):
        writer.add_documents(np.array([1, 70000]), np.array([2]))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_visible_before_finish(tmp_path: Path):
    writer = IndexedWriter(tmp_path / "x", np.dtype("uint16"))
    writer.add_documents(np.array([1, 2]), np.array([2]))
    writer.close()
    assert all(path.name.endswith(".tmp") for path in tmp_path.iterdir())
    writer.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "x", np.dtype("uint16")) as writer:
        writer.add_documents(np.array([1, 2]), np.array([2]))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_without_documents_is_a_valid_pair(tmp_path: Path):
    with IndexedWriter(tmp_path / "none", np.dtype("uint16")):
        pass
    reader = IndexedReader(tmp_path / "none")
    assert (len(reader), reader.document_count, reader.token_count) == (0, 0, 0)


def test_a_truncated_bin(prefix: Path):
    prefix.with_suffix(".bin").write_bytes(GOLDEN_BIN[:-1])
    with pytest.raises(MtError, match=r"golden\.bin: is truncated: 9 bytes, .*golden\.idx promises 10"):
        IndexedReader(prefix)


def test_a_truncated_idx(prefix: Path):
    prefix.with_suffix(".idx").write_bytes(GOLDEN_IDX[:-1])
    with pytest.raises(MtError, match=r"golden\.idx: is truncated: 101 bytes, its header promises 102"):
        IndexedReader(prefix)


def test_a_bin_that_belongs_to_another_idx(prefix: Path):
    prefix.with_suffix(".bin").write_bytes(GOLDEN_BIN * 2)
    with pytest.raises(MtError, match=r"does not belong to .*golden\.idx: 20 bytes where it promises 10"):
        IndexedReader(prefix)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"PK", "is not an index of token ids"),
        (9, b"\2", "has version 2; version 1"),
        (17, b"\x63", "has dtype code 99; codes 1 to 8"),
        (94, b"\x07", "documents do not end at its 3 sequences"),
    ],
)
def test_a_wrong_header(prefix: Path, at: int, value: bytes, message: str):
    damaged = GOLDEN_IDX[:at] + value + GOLDEN_IDX[at + len(value) :]
    prefix.with_suffix(".idx").write_bytes(damaged)
    with pytest.raises(MtError, match=message):
        IndexedReader(prefix)


def test_a_missing_pair_suggests_the_nearest(prefix: Path):
    with pytest.raises(MtError, match=r"no file .*goldne\.bin and .*goldne\.idx; did you mean .*golden'\?"):
        IndexedReader(prefix.with_name("goldne"))


def test_a_missing_half(prefix: Path):
    prefix.with_suffix(".bin").unlink()
    with pytest.raises(MtError, match=r"no file [^ ]*golden\.bin; no \.bin/\.idx pair in"):
        IndexedReader(prefix)
