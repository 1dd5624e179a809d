"""What `mt data preprocess` reads: kinds of files, directories and globs in sorted order, and what cannot be read."""

import bz2
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import zstandard

from mt_core.errors import MtError
from mt_data.config import TokenizerConfig
from mt_data.indexed.reader import IndexedReader
from mt_data.preprocess import chunking
from mt_data.preprocess.chunking import CuttingOptions, InputPosition, count_input_bytes, cut_pieces
from mt_data.preprocess.encoding import EncodingOptions
from mt_data.preprocess.job import PreprocessJob
from mt_data.preprocess.reading import read_documents
from mt_data.preprocess.run import preprocess
from mt_data.text_io.inputs import find_inputs

BYTES = EncodingOptions(TokenizerConfig(type="bytes"))
COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstandard.ZstdCompressor().compress, "": bytes}


def run(*inputs: Path, **changes: object) -> list[str]:
    """Every sequence as text."""
    job = replace(PreprocessJob(inputs, str(inputs[0].parent / "out"), BYTES), **changes)  # pyright: ignore[reportArgumentType]
    preprocess(job)
    reader = IndexedReader(job.prefix("text"))
    return [bytes(reader.get(i).tolist()).decode() for i in range(len(reader))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of every kind, in an order that is not the sorted one."""
    pytest.importorskip("pyarrow")
    from pyarrow import parquet, table

    root = tmp_path / "corpus"
    (root / "sub" / ".hidden").mkdir(parents=True)
    (root / "sub" / "c.txt").write_text("three\nlines\n")
    (root / "b.jsonl.bz2").write_bytes(bz2.compress(b'{"text": "bz2"}\n'))
    (root / "a.ndjson").write_text('{"text": "plain"}')
    (root / "notes.md").write_text("no data")
    (root / "sub" / ".hidden" / "x.txt").write_text("hidden")
    parquet.write_table(table({"n": [1, 2], "text": ["row 1", "row 2"]}), root / "d.parquet")
    return root


def test_a_directory_is_everything_of_a_known_kind_sorted_by_path(folder: Path):
    assert run(folder) == ["plain", "bz2", "row 1", "row 2", "three\nlines\n"]


def test_a_glob_is_sorted(folder: Path):
    assert run(folder / "*.*s*n*") == ["plain", "bz2"]
    assert run(folder / "**" / "*.txt") == ["three\nlines\n"]


def test_names_keep_their_order(folder: Path):
    assert run(folder / "b.jsonl.bz2", folder / "a.ndjson", folder / "b.jsonl.bz2") == ["bz2", "plain", "bz2"]


def test_a_format_that_is_named_takes_every_file(folder: Path):
    (folder / "d.parquet").unlink()
    (folder / "b.jsonl.bz2").unlink()
    assert run(folder, input_format="text") == ['{"text": "plain"}', "no data", "three\nlines\n"]


def test_lines_of_a_text_can_be_documents(folder: Path):
    assert run(folder / "sub" / "c.txt", text_documents="line") == ["three", "lines"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_pieces_hold_every_line_once_and_each_can_be_the_first(
    tmp_path: Path, texts: list[str], suffix: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(chunking, "PIECE_BYTES", 997)
    monkeypatch.setattr("mt_data.text_io.lines.BLOCK_BYTES", 997)
    path = tmp_path / f"in.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix]("\n".join(json.dumps({"text": text}) for text in texts).encode()))
    files = find_inputs([path, path])
    everything = list(cut_pieces(files, CuttingOptions(), InputPosition()))
    assert (
        sum(piece.disk_bytes for piece in everything)
        == count_input_bytes(files, CuttingOptions())
        == 2 * path.stat().st_size
    )
    starts = [InputPosition(), *(piece.after for piece in everything)]
    pieces = [[values[0] for values in read_documents(piece.source, CuttingOptions()).values] for piece in everything]
    assert list(chain.from_iterable(pieces)) == texts * 2
    for at in (0, 1, len(starts) // 3, len(starts) // 2 + 1, len(starts) - 1):
        rest = [
            read_documents(piece.source, CuttingOptions()).values
            for piece in cut_pieces(files, CuttingOptions(), starts[at])
        ]
        assert [values[0] for piece in rest for values in piece] == list(chain.from_iterable(pieces[at:]))


def test_rows_of_a_parquet_file_are_read_from_any_position(tmp_path: Path, texts: list[str]):
    pytest.importorskip("pyarrow")
    from pyarrow import parquet, table

    rows = table({"text": texts, "other": list(range(len(texts)))})
    parquet.write_table(rows, tmp_path / "x.parquet", row_group_size=300)
    files = find_inputs([tmp_path / "x.parquet"])
    for start in (0, 256, 300):
        rest = [piece.source for piece in cut_pieces(files, CuttingOptions(), InputPosition(0, start))]
        values = [value for source in rest for (value,) in read_documents(source, CuttingOptions()).values]
        assert values == texts[start:]


def test_what_is_wrong_with_parquet(tmp_path: Path):
    pytest.importorskip("pyarrow")
    from pyarrow import parquet, table

    path = tmp_path / "x.parquet"
    parquet.write_table(table({"body": ["a", None], "n": [1, 2]}), path)
    with pytest.raises(
        MtError, match=r"x\.parquet: has no column 'text'; --json-keys names columns of it: 'body', 'n'"
    ):
        run(path)
    with pytest.raises(MtError, match=r"x\.parquet: row 2: key 'body' is null, not a text; a text in every row"):
        run(path, encoding=replace(BYTES, keys=("body",)))
    path.write_bytes(b"PAR1")
    with pytest.raises(MtError, match=r"x\.parquet: is not a readable parquet file"):
        run(path)
    path.rename(tmp_path / "x.parquet.gz")
    with pytest.raises(MtError, match=r"is a compressed parquet file; decompress it"):
        run(tmp_path / "x.parquet.gz")


def test_sentences_that_are_split_already_are_sequences(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": ["One.", "", "Two."]}\n{"text": []}\n{"text": ["Three."]}\n')
    assert run(path, encoding=replace(BYTES, append_eod=False)) == ["One.", "Two.", "Three."]
    assert IndexedReader(tmp_path / "out_text_document").documents.tolist() == [0, 2, 2, 3]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_line_over_the_limit_is_an_error_or_is_skipped(tmp_path: Path, suffix: str, at: int):
    lines = ['{"text": "a"}', '{"text": "b"}']
    lines.insert(at, json.dumps({"text": "x" * 3_000_000}))
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix]("\n".join(lines).encode()))
    message = rf"x\.jsonl{suffix}:{at + 1}: has 2\.9 MiB, more than the 2 MiB of --max-line-mb"
    with pytest.raises(MtError, match=message):
        run(path, max_line_mb=2)
    assert run(path, max_line_mb=2, on_error="skip") == ["a", "b"]
    assert len(run(path, max_line_mb=3)) == 3


def test_a_line_of_100_mb_is_refused_in_bounded_memory(tmp_path: Path):
    path = tmp_path / "long.jsonl"
    with path.open("w") as file:
        file.write('{"text": "')
        for _ in range(100):
            file.write("x" * 10**6)
        file.write('"}\n{"text": "short"}\n')
    code = (
        "from pathlib import Path; from mt_cli.main import main\n"
        "try: main()\n"
        "finally: print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    command = ["data", "preprocess", "--input", path, "--tokenizer-type", "bytes", "--output-prefix", tmp_path / "out"]
    ran = subprocess.run([sys.executable, "-c", code, *command, "--workers", "1"], capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr == (
        f"mt: {path}:1: has 95.4 MiB, more than the 32 MiB of --max-line-mb; one JSON object a line\n"
    )
    assert int(ran.stdout) < 250_000


def test_text_that_is_too_large_or_not_utf8(tmp_path: Path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"ab\xff")
    with pytest.raises(MtError, match=r"x\.txt: is not UTF-8 at byte 3; UTF-8 text; --text-documents line"):
        run(path)
    path.write_bytes(b"x" * 2**20)
    with pytest.raises(MtError, match=r"x\.txt: has 1\.0 MiB, more than the 0\.5 MiB of --max-line-mb"):
        run(path, max_line_mb=0.5)


def test_directories_and_globs_without_files(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MtError) as error:
        run(tmp_path / "empty", tmp_path / "*.jsonl")
    assert str(error.value).splitlines() == [
        f"{tmp_path}/empty: is a directory without a file of a known kind; files named *.jsonl, *.ndjson, *.json, "
        "*.parquet, *.txt, or say --input-format",
        f"{tmp_path}/*.jsonl: matches no file; quote it if the shell should leave it alone",
    ]


@pytest.fixture
def as_nobody() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`find_inputs` in a process that may not read everything."""

    def call(path: Path) -> subprocess.CompletedProcess[str]:
        code = (
            "import os, sys; from pathlib import Path; from mt_core.errors import MtError\n"
            "from mt_data.text_io.inputs import find_inputs\n"
            "if os.getuid() == 0: os.setuid(65534)\n"
            "try: print(*find_inputs([Path(sys.argv[1])]))\n"
            "except MtError as err: sys.exit(f'mt: {err}')"
        )
        return subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)

    return call


def test_a_directory_or_file_without_read_permission(
    tmp_path: Path, as_nobody: Callable[..., subprocess.CompletedProcess[str]]
):
    for above in (tmp_path, *tmp_path.parents):
        if (
            above != Path("/")
            and os.access(above, os.W_OK)
            and above.stat().st_uid == os.getuid()
            and above != Path("/tmp")
        ):
            above.chmod(above.stat().st_mode | 0o055)
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "a.jsonl").touch()
    (tmp_path / "open" / "closed").mkdir(mode=0o300)
    ran = as_nobody(tmp_path / "open")
    assert ran.stderr == (f"mt: {tmp_path}/open/closed: cannot be read (Permission denied); check its permissions\n")
    (tmp_path / "open" / "closed").rmdir()
    (tmp_path / "open" / "a.jsonl").chmod(0o200)
    ran = as_nobody(tmp_path / "open")
    assert ran.stderr == f"mt: {tmp_path}/open/a.jsonl: cannot be read (Permission denied); check its permissions\n"
