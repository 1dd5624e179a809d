"""`mt data merge`, and Megatron's own IndexedDataset as the judge of every byte that is written."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mt_core.errors import MtError
from mt_data.indexed.reader import IndexedReader
from mt_data.indexed.writer import IndexedWriter
from mt_data.preprocess.encoding import EncodedKey
from mt_data.preprocess.output import OutputFiles
from mt_data.tools.merge import find_pairs, merge_pairs

Write = Callable[[str, Sequence[int]], str]
SETTINGS = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
documents = st.lists(st.lists(st.lists(st.integers(0, 65499), min_size=1, max_size=5), max_size=3), max_size=6)


def files(prefix: str | Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def ours(prefix: Path, corpus: list[list[list[int]]], dtype: str, *, pieces: int = 1) -> None:
    """Written the way that preprocessing does, in some pieces."""
    parts = OutputFiles(prefix.parent, prefix.name, np.dtype(dtype))
    parts.open({})
    for at in range(pieces):
        piece = corpus[at * len(corpus) // pieces : (at + 1) * len(corpus) // pieces]
        flat = [sentence for document in piece for sentence in document]
        tokens = np.array([token for sentence in flat for token in sentence], dtype)
        lengths, counts = np.array(list(map(len, flat)), np.int32), np.array(list(map(len, piece)), np.int32)
        parts.add(EncodedKey(tokens, lengths, counts), 0)
    parts.commit()
    parts.close()
    parts.seal()
    parts.sealed_bin.replace(f"{prefix}.bin")


def megatrons(prefix: Path, corpus: list[list[list[int]]], dtype: str, *, modes: bool = False) -> None:
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    builder = module.IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.dtype(dtype).type, multimodal=modes)
    for document in corpus:
        for number, sentence in enumerate(document):
            builder.add_item(torch.tensor(sentence, dtype=torch.int64), *([number % 3] if modes else []))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


@SETTINGS
@given(corpus=documents, dtype=st.sampled_from(["uint16", "int32"]), pieces=st.integers(1, 3))
def test_bytes_equal_megatrons_and_each_reads_the_other(
    tmp_path: Path, corpus: list[list[list[int]]], dtype: str, pieces: int
):
    megatrons(tmp_path / "reference", corpus, dtype)
    ours(tmp_path / "ours", corpus, dtype, pieces=pieces)
    assert files(tmp_path / "ours") == files(tmp_path / "reference")
    flat = [sentence for document in corpus for sentence in document]
    reader = IndexedReader(tmp_path / "reference")
    assert [reader.get(i).tolist() for i in range(len(reader))] == flat
    if flat:  # Megatron does not open an empty one
        module = pytest.importorskip("megatron.core.datasets.indexed_dataset")
        reference = module.IndexedDataset(str(tmp_path / "ours"))
        assert [reference[i].tolist() for i in range(len(reference))] == flat
        assert reference.document_indices.tolist() == reader.documents.tolist()


@pytest.mark.slow
@settings(SETTINGS, max_examples=8)
@given(parts=st.lists(documents, min_size=1, max_size=4), modes=st.booleans())
def test_a_merge_equals_add_index(tmp_path: Path, parts: list[list[list[list[int]]]], modes: bool):
    module = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    parts = [part or [[[1]]] for part in parts]
    parts = [part if any(part) else [[[1]]] for part in parts]  # Megatron does not open an empty one
    builder = module.IndexedDatasetBuilder(str(tmp_path / "reference.bin"), dtype=np.int32, multimodal=modes)
    prefixes = [str(tmp_path / f"part{number}") for number in range(len(parts))]
    for prefix, part in zip(prefixes, parts, strict=True):
        megatrons(Path(prefix), part, "int32", modes=modes)
        builder.add_index(prefix)
    builder.finalize(str(tmp_path / "reference.idx"))
    merged = merge_pairs(prefixes, str(tmp_path / "ours"), multimodal=modes)
    assert files(tmp_path / "ours") == files(tmp_path / "reference")
    assert merged.documents == sum(map(len, parts))


def test_the_golden_pair_merged_with_itself(tmp_path: Path):
    with IndexedWriter(tmp_path / "golden", np.dtype("uint16")) as writer:
        writer.add_documents(np.array([1, 2, 3]), np.array([3, 0]))
        writer.add_document(np.array([258, 50256]), np.array([1, 1]))
    merge_pairs([str(tmp_path / "golden")] * 2, str(tmp_path / "twice"))
    reader = IndexedReader(tmp_path / "twice")
    assert reader.lengths.tolist() == [3, 1, 1, 3, 1, 1]
    assert reader.pointers.tolist() == [0, 6, 8, 10, 16, 18]
    assert reader.documents.tolist() == [0, 1, 1, 3, 4, 4, 6]


def test_the_command_merges_a_directory_in_sorted_order(tmp_path: Path):
    for name, token in (("b", 2), ("a", 1), ("a10", 10)):
        (tmp_path / "in").mkdir(exist_ok=True)
        with IndexedWriter(tmp_path / "in" / name, np.dtype("uint16")) as writer:
            writer.add_documents(np.array([token]), np.array([1]))
    command = ["data", "merge", "--input", tmp_path / "in", "--output-prefix", tmp_path / "new" / "all"]
    ran = subprocess.run([sys.executable, "-m", "mt_cli", *command], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines()[-1].endswith("3 tokens, 3 sequences, 3 documents")
    assert [IndexedReader(tmp_path / "new" / "all").get(i).tolist() for i in range(3)] == [[1], [10], [2]]


def test_strays_and_missing_partners_are_all_named(tmp_path: Path, corpus: Write):
    corpus("a", [1])
    corpus("b", [1])
    (tmp_path / "a.bin").unlink()
    with pytest.raises(MtError, match=r"no file [^ ]*/a\.bin"):
        find_pairs([str(tmp_path)])
    (tmp_path / "notes.txt").touch()
    (tmp_path / "c.json").touch()
    with pytest.raises(MtError) as error:
        find_pairs([str(tmp_path), str(tmp_path / "x*")])
    assert str(error.value).splitlines() == [
        f"{tmp_path}/c.json: is neither a .bin nor an .idx; move it out of the way",
        f"{tmp_path}/notes.txt: is neither a .bin nor an .idx; move it out of the way",
        f"{tmp_path}/x*: matches no .idx file; quote it if the shell should leave it alone",
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(MtError, match=r"holds no \.bin/\.idx pair; mt data preprocess writes them"):
        find_pairs([str(tmp_path / "empty")])


def test_what_cannot_be_merged_is_named_together(tmp_path: Path, corpus: Write):
    good, cut = corpus("good", [2, 3]), corpus("cut", [4])
    Path(f"{cut}.bin").write_bytes(b"")
    with IndexedWriter(tmp_path / "wide", np.dtype("int32")) as writer:
        writer.add_documents(np.array([1]), np.array([1]))
    with pytest.raises(MtError) as error:
        merge_pairs([good, cut, str(tmp_path / "wide")], good, multimodal=True)
    lines = str(error.value).splitlines()
    assert f"{cut}.bin: is truncated: 0 bytes, {cut}.idx promises 8; copy or preprocess it again" in lines
    assert f"{tmp_path}/wide.idx: holds int32, {good}.idx uint16; one token type" in lines
    assert f"{good}.idx: has no modes; merge it without --multimodal" in lines
    assert f"{good}: is one of the inputs; choose another --output-prefix" in lines
    assert files(good)[0]
    assert not list(tmp_path.glob("*.tmp"))


def test_records_of_splitters_travel_and_must_agree(tmp_path: Path, corpus: Write):
    a, b = corpus("a_text_sentence", [1]), corpus("b_text_sentence", [2])
    Path(f"{a}.json").write_text('{"splitter": "sentencex"}')
    Path(f"{b}.json").write_text('{"splitter": "sentencex"}')
    merge_pairs(find_pairs([str(tmp_path)]), str(tmp_path / "all_text_sentence"))
    assert (tmp_path / "all_text_sentence.json").read_text() == '{"splitter": "sentencex"}'
    Path(f"{b}.json").write_text('{"splitter": "nltk punkt"}')
    with pytest.raises(MtError, match="sentences of its parts were split in different ways; split them again"):
        merge_pairs([a, b], str(tmp_path / "other_text_sentence"))
