"""Every file that a command of `mt data` opens, in every bad state: one line that says where and what, no traceback."""

import bz2
import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard

from bad_inputs import DIGITS, Result, assert_one_clean_line, bad_directories, bad_files, fill_disk, run_mt
from chat_tokenizers import write_chat_tokenizer
from mt_data.indexed.writer import IndexedWriter
from word_pieces import toy_tokenizer

ALWAYS_WRONG = ("missing", "directory for a file", "no permission")
"""What no command can read; what else a file is, some may take: an empty one, or text that is cut off."""
TEXTS = [f"the quick brown fox {number} jumps over the lazy dog and then rests a while" for number in range(40)]
RECORDS = [{"text": text, "url": f"https://example.com/{number}"} for number, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
Words = Callable[[Path, Path], list[object]]
"""The words of a command, for the path of its input and that of its output."""


def assert_clean(done: Result, fault: str, *, may_succeed: bool = False) -> None:
    """One line for each problem, where there are several."""
    lines = done.stderr.splitlines()
    if len(lines) > 1 and all(line.startswith("mt: ") for line in lines):
        done = replace(done, stderr=lines[0])
    assert_one_clean_line(done, fault, may_succeed=may_succeed)


def write_example(folder: Path, name: str) -> Path:
    """A file that is right, of the kind that its name says."""
    path, content = folder / name, LINES
    folder.mkdir(exist_ok=True, parents=True)
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "url": TEXTS}), path)
        return path
    if ".txt" in name:
        content = "".join(text + "\n" for text in TEXTS).encode()
    elif name == "pairs.jsonl":
        content = json.dumps({"https://example.com/1": [{"https://example.com/2": 0.9}]}).encode() + b"\n"
    elif name == "groups.jsonl":
        content = b'{"0": ["https://example.com/1", "https://example.com/2"]}\n'
    elif name == "wiki_00":
        content = b'<doc id="1" url="u" title="One">\nOne\n\nText of it.\n</doc>\n'
    packed = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstandard.ZstdCompressor().compress}
    path.write_bytes(packed.get(path.suffix, bytes)(content))
    return path


def preprocess(*more: object) -> Words:
    tokenizer = ("--tokenizer-type", "bytes", "--workers", 1)
    return lambda path, out: ["data", "preprocess", "--input", path, "--output-prefix", out, *tokenizer, *more]


def step(name: str, *more: object) -> Words:
    return lambda path, out: ["data", "openwebtext", name, "--input", path, "--output", out, *more]


def with_corpus(name: str, option: str) -> Words:
    """A step over a corpus that is right, which reads another file too."""

    def words(path: Path, out: Path) -> list[object]:
        corpus = write_example(path.parent, "corpus.jsonl")
        return ["data", "openwebtext", name, "--input", corpus, option, path, "--output", out]

    return words


def train_tokenizer(path: Path, out: Path) -> list[object]:
    return ["data", "train-tokenizer", "--input", path, "--output-dir", out, "--vocab-size", 270]


def extract(path: Path, out: Path) -> list[object]:
    return ["data", "wikipedia", "extract", "--input", path, "--output", out]


COMMANDS: dict[str, tuple[tuple[str, ...], Words]] = {
    "preprocess": (("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.jsonl.bz2", "a.parquet", "a.txt"), preprocess()),
    "preprocess, bad lines skipped": (("a.jsonl", "a.jsonl.gz"), preprocess("--on-error", "skip")),
    "preprocess into sentences": (("a.jsonl",), preprocess("--split-sentences")),
    "train-tokenizer": (("a.jsonl", "a.txt", "a.txt.gz"), train_tokenizer),
    "clean": (("a.jsonl", "a.jsonl.gz"), step("clean", "--min-tokens", 2)),
    "find-duplicates": (("a.jsonl",), step("find-duplicates")),
    "group-duplicates": (("pairs.jsonl",), step("group-duplicates")),
    "remove-duplicates": (("groups.jsonl",), with_corpus("remove-duplicates", "--groups")),
    "filter-ngrams": (("a.jsonl", "tasks.txt"), with_corpus("filter-ngrams", "--tasks")),
    "add-id": (("a.jsonl",), step("add-id", "--id-prefix", "x")),
    "blacklist-urls": (("a.txt",), with_corpus("blacklist-urls", "--blacklist")),
    "extract": (("wiki_00",), extract),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_files_of_text(tmp_path: Path, command: str):
    names, words = COMMANDS[command]
    for name in names:
        example, out = write_example(tmp_path / "right", name), tmp_path / "out"
        right = run_mt(*words(example, out / f"right-{name}"))
        assert right.returncode == 0, right.stderr
        for number, (fault, path) in enumerate(bad_files(tmp_path, example)):
            may_succeed = not fault.startswith(ALWAYS_WRONG)
            done = run_mt(*words(path, out / f"{name}-{number}"))
            assert_clean(done, f"{command}, {fault}", may_succeed=may_succeed)


def write_pair(folder: Path) -> Path:
    folder.mkdir(parents=True)
    with IndexedWriter(folder / "pair", np.dtype("uint16")) as writer:
        for number in range(9):
            writer.add_document(np.arange(number + 20), np.array([number + 10, 10]))
    return folder


PAIR_COMMANDS: dict[str, Callable[[Path], list[object]]] = {
    "check": lambda prefix: ["data", "check", prefix],
    "inspect": lambda prefix: ["data", "inspect", prefix, "--document", 1],
    "blend": lambda prefix: ["data", "blend", "--data-path", prefix, "--samples", 4, "--seq-length", 8],
    "merge": lambda prefix: ["data", "merge", "--input", prefix, "--output-prefix", prefix.parents[1] / "merged"],
    "plan": lambda prefix: ["data", "plan", "--set", "data.kind=gpt", "--set", f'data.paths=["{prefix}"]', "--set",
                            'data.split="1"', "--set", "data.seq_length=8", "--set", "train.steps=2"],
}  # fmt: skip


@pytest.mark.parametrize("command", PAIR_COMMANDS)
def test_pairs(tmp_path: Path, command: str):
    folder, words = write_pair(tmp_path / "right"), PAIR_COMMANDS[command]
    right = run_mt(*words(folder / "pair"))
    assert right.returncode == 0, right.stderr
    for fault, path in bad_directories(tmp_path, folder):
        may_succeed = fault.startswith("not UTF-8") and command != "check"  # other numbers in the right places
        done = run_mt(*words(path / "pair"))
        assert_clean(done, f"{command}, {fault}", may_succeed=may_succeed or fault.startswith("no permission"))


def write_sentencepiece(folder: Path) -> Path:
    import sentencepiece

    path = folder / "tokenizer.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=60, hard_vocab_limit=False, minloglevel=2
        )
    return path


def write_tik(folder: Path) -> Path:
    import base64

    path = folder / "tik.json"
    entries = [
        {"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": chr(i)} for i in range(256)
    ]
    path.write_text(json.dumps(entries))
    return path


def write_tokenizer_json(folder: Path) -> Path:
    write_chat_tokenizer(folder)
    return folder / "tokenizer.json"


def write_gpt2(folder: Path) -> Path:
    corpus = write_example(folder.parent / "corpus", "a.jsonl")
    assert run_mt(*train_tokenizer(corpus, folder / "gpt2")).returncode == 0
    return folder / "gpt2" / "vocab.json"


TOKENIZERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], list[object]]]] = {
    "tokenizer.json": (write_tokenizer_json, lambda path: ["--tokenizer-model", path]),
    "vocab.txt": (
        lambda folder: Path(str(toy_tokenizer(folder).vocab_file)),
        lambda path: ["--tokenizer-type", "BertWordPieceCase", "--vocab-file", path],
    ),
    ".model": (
        write_sentencepiece,
        lambda path: ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", path],
    ),
    "tiktoken": (
        write_tik,
        lambda path: ["--tokenizer-type", "TikTokenizer", "--tokenizer-model", path, "--vocab-size", 1256],
    ),
    "vocab.json": (
        write_gpt2,
        lambda path: ["--vocab-file", path, "--merge-file", path.with_name("merges.txt")],
    ),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_files_of_tokenizers(tmp_path: Path, kind: str):
    write, options = TOKENIZERS[kind]
    (tmp_path / "right").mkdir()
    corpus, example = write_example(tmp_path / "corpus", "a.jsonl"), write(tmp_path / "right")
    command = ["data", "preprocess", "--input", corpus, "--workers", 1, "--output-prefix"]
    right = run_mt(*command, tmp_path / "out" / "right", *options(example))
    assert right.returncode == 0, right.stderr
    for number, (fault, path) in enumerate(bad_directories(tmp_path, example.parent)):
        done = run_mt(*command, tmp_path / "out" / str(number), *options(path / example.name))
        assert_clean(done, f"{kind}, {fault}", may_succeed=True)
    for file in (file.name for file in example.parent.glob("*.json")):
        copy = shutil.copytree(example.parent, tmp_path / "deep" / file)
        (copy / file).write_text('{"a": ' + "[" * 100_000)
        done = run_mt(*command, tmp_path / "out" / "deep", *options(copy / example.name))
        assert_clean(done, f"{kind}, deep {file}", may_succeed=file != example.name)


@pytest.mark.parametrize("command", COMMANDS)
def test_outputs_that_cannot_be_written(tmp_path: Path, command: str):
    names, words = COMMANDS[command]
    example = write_example(tmp_path / "right", names[0])
    sealed, file = tmp_path / "sealed", tmp_path / "file"
    sealed.mkdir()
    sealed.chmod(0o500)
    file.write_text("a file\n")
    for out in (sealed / "out", file / "out"):
        words_of_run = words(example, tmp_path / "out")
        place = words_of_run.index(tmp_path / "out")
        assert_one_clean_line(run_mt(*words_of_run[:place], out, *words_of_run[place + 1 :]), f"{command}, {out}")
    assert list(sealed.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk(tmp_path: Path, small_disk: Path, command: str):
    names, words = COMMANDS[command]
    example = write_example(tmp_path / "right", names[0])
    words_of_run = words(example, tmp_path / "out")
    place = words_of_run.index(tmp_path / "out")
    fill_disk(small_disk)
    done = run_mt(*words_of_run[:place], small_disk / "out", *words_of_run[place + 1 :])
    assert_one_clean_line(done, command)
    assert "the disk is full" in done.stderr


HUGE = '{"text": "b", "unused": %s}' % ("9" * DIGITS)


def test_a_number_that_python_does_not_read(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + HUGE + '\n{"text": "c"}\n')
    stopped = run_mt(*preprocess()(path, tmp_path / "stopped"))
    assert_one_clean_line(stopped)
    assert f"mt: {path}:2: holds a whole number of more than 4,300 digits; one JSON object a line\n" in stopped.stderr
    skipped = run_mt(*preprocess("--on-error", "skip")(path, tmp_path / "skipped"))
    assert skipped.returncode == 0
    assert "a.jsonl:2: holds a whole number of more than 4,300 digits" in skipped.stderr
    assert (tmp_path / "skipped_text_document.bin").read_bytes() == np.array([97, 99], "<u2").tobytes()


def test_half_a_character_in_a_key_that_is_not_read_is_kept(tmp_path: Path):
    path, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"text": "ü", "other\\ud800": "\\udc00"}\n')
    assert run_mt(*step("add-id", "--id-prefix", "x")(path, out)).returncode == 0
    assert json.loads(out.read_text()) == {"text": "ü", "other\ud800": "\udc00", "adlr_id": "x-0000000001"}


@pytest.mark.parametrize("key", ["a/b", "a\0b", "k" * 250, "\ud800"])
def test_a_key_that_is_no_part_of_a_file_name(tmp_path: Path, key: str):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({key: "text", "text": "text"}) + "\n")
    done = run_mt(*preprocess("--json-keys", "text", key)(path, tmp_path / "out"))
    assert_one_clean_line(done)
    assert "--json-keys: " in done.stderr
    assert "cannot be part of a file's name" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_column_that_is_no_part_of_a_file_name(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"a/b": TEXTS}), tmp_path / "a.parquet")
    done = run_mt(*preprocess("--json-keys", "a/b")(tmp_path / "a.parquet", tmp_path / "out"))
    assert_one_clean_line(done)
    assert done.stderr.startswith("mt: --json-keys: 'a/b' cannot be part of a file's name; rename it in the data")


@pytest.mark.usefixtures("real_processes")
def test_a_name_that_is_not_text(tmp_path: Path):
    """A file whose name is no UTF-8, in a process of its own, whose output is a stream of bytes."""
    folder = write_pair(tmp_path / "right")
    name = os.fsencode(tmp_path) + b"/\xff"
    for suffix in (b".idx", b".bin"):
        os.rename(os.fsencode(folder) + b"/pair" + suffix, name + suffix)
    done = subprocess.run([sys.executable, "-m", "mt_cli", "data", "check", name], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"ok: " + os.fsencode(tmp_path) + rb"/\udcff: 9 documents")


def test_rows_that_are_no_texts(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    bytes_as_text = pyarrow.array([b"ok", b"\xff\xfe", b"fine"], pyarrow.binary()).view(pyarrow.string())
    columns = {
        "no-utf8": (bytes_as_text, "row 2: key 'text' is bytes, not UTF-8 text; a text in every row"),
        "binary": (pyarrow.array([b"ok"]), "row 1: key 'text' is bytes, not UTF-8 text; a text in every row"),
        "dates": (pyarrow.array([0], pyarrow.date32()), "row 1: key 'text' is a date, not a text; a text in every row"),
    }
    for name, (column, message) in columns.items():
        path = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
        done = run_mt(*preprocess()(path, tmp_path / "out"))
        assert_one_clean_line(done, name)
        assert f"mt: {path}: {message}\n" in done.stderr
        assert run_mt(*preprocess("--on-error", "skip")(path, tmp_path / "skipped")).returncode == 0
    assert (tmp_path / "skipped_text_document.idx").is_file()


def test_a_parquet_file_with_a_damaged_page(tmp_path: Path):
    path = write_example(tmp_path, "a.parquet")
    content = bytearray(path.read_bytes())
    content[20:600:3] = bytes(byte ^ 0x5A for byte in content[20:600:3])
    path.write_bytes(content)
    for skip in ((), ("--on-error", "skip")):
        done = run_mt(*preprocess(*skip)(path, tmp_path / "out"))
        assert_one_clean_line(done)
        assert f"mt: {path}: is damaged (" in done.stderr
