"""`mt data preprocess`: the bytes on disk, every kind of bad line, and nothing half-written whatever stops it."""

import gzip
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import zstandard

from mt_core.errors import MtError
from mt_data.config import TokenizerConfig
from mt_data.indexed.reader import IndexedReader
from mt_data.preprocess.encoding import EncodingOptions
from mt_data.preprocess.job import PreprocessJob
from mt_data.preprocess.run import preprocess
from mt_data.text_io.lines import read_chunks
from mt_data.text_io.ordered_map import ordered_map
from mt_data.tokenizers import build_tokenizer

BYTES = EncodingOptions(TokenizerConfig(type="bytes"), append_eod=True)


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., PreprocessJob]:
    """A job on lines given as text or bytes."""

    def make(*lines: str | bytes, **changes: object) -> PreprocessJob:
        path = tmp_path / "in.jsonl"
        path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
        return replace(PreprocessJob((path,), str(tmp_path / "out"), BYTES), **changes)  # pyright: ignore[reportArgumentType]

    return make


def outputs(job: PreprocessJob, key: str = "text") -> tuple[bytes, bytes]:
    return Path(job.prefix(key) + ".bin").read_bytes(), Path(job.prefix(key) + ".idx").read_bytes()


def written(job: PreprocessJob) -> list[str]:
    return sorted(path.name for path in Path(job.output_prefix).parent.glob("out*"))


def documents(job: PreprocessJob, key: str = "text") -> list[list[int]]:
    reader = IndexedReader(job.prefix(key))
    return [reader.get(i).tolist() for i in range(len(reader))]


@pytest.mark.parametrize("append_eod", [False, True])
def test_real_text_equals_a_plain_encoding(
    gpt2: TokenizerConfig, jsonl: Path, texts: list[str], tmp_path: Path, append_eod: bool
):
    job = PreprocessJob((jsonl,), str(tmp_path / "out"), EncodingOptions(gpt2, append_eod=append_eod))
    report = preprocess(job)
    tokenizer = build_tokenizer(gpt2)
    plain = [tokenizer.encode(text) + [tokenizer.eod] * append_eod for text in texts if text]
    data, index = outputs(job)
    assert data == b"".join(np.array(ids, "<u2").tobytes() for ids in plain)
    assert np.frombuffer(index, "<i4", count=len(plain), offset=34).tolist() == [len(ids) for ids in plain]
    assert (report.documents, report.empty, report.skipped) == (len(texts), {"text": 1}, 0)
    assert report.tokens == {"text": sum(map(len, plain))}
    assert report.bytes == jsonl.stat().st_size


def test_an_empty_document_is_a_boundary_without_a_sequence(job: Callable[..., PreprocessJob]):
    preprocess(this := job('{"text": "ab"}', '{"text": ""}', '{"text": "c"}'))
    assert documents(this) == [[97, 98, 256], [99, 256]]
    assert IndexedReader(this.prefix("text")).documents.tolist() == [0, 1, 1, 2]


def test_two_workers_write_the_same_bytes(gpt2: TokenizerConfig, jsonl: Path, tmp_path: Path):
    one = PreprocessJob((jsonl,) * 3, str(tmp_path / "one"), EncodingOptions(gpt2, append_eod=True))
    two = replace(one, output_prefix=str(tmp_path / "two"), workers=2)
    preprocess(one)
    preprocess(two)
    assert outputs(one) == outputs(two)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_input_gives_the_same_bytes(jsonl: Path, tmp_path: Path, suffix: str):
    compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    raw = jsonl.read_bytes()
    half = raw.index(b"\n", len(raw) // 2) + 1
    packed = tmp_path / f"texts.jsonl{suffix}"
    packed.write_bytes(compress(raw[:half]) + compress(raw[half:]))  # two frames, as parallel compressors write
    plain = PreprocessJob((jsonl,), str(tmp_path / "plain"), BYTES)
    from_packed = replace(plain, inputs=(packed,), output_prefix=str(tmp_path / "packed"))
    preprocess(plain)
    preprocess(from_packed)
    assert outputs(plain) == outputs(from_packed)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut short", "not compressed"])
def test_damaged_compressed_input(jsonl: Path, tmp_path: Path, suffix: str, damage: str):
    compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    packed = tmp_path / f"texts.jsonl{suffix}"
    packed.write_bytes(compress(jsonl.read_bytes())[:-20] if damage == "cut short" else jsonl.read_bytes())
    job = PreprocessJob((packed,), str(tmp_path / "out"), BYTES)
    with pytest.raises(MtError, match=rf"texts\.jsonl\{suffix}: is damaged or cut short"):
        preprocess(job)
    assert written(job) == []


def test_each_key_gets_its_own_pair(job: Callable[..., PreprocessJob]):
    encoding = replace(BYTES, keys=("title", "text"))
    preprocess(this := job('{"text": "ab", "title": "T"}', '{"title": "U", "text": ""}', encoding=encoding))
    assert written(this) == [f"out_{key}_document.{suffix}" for key in ("text", "title") for suffix in ("bin", "idx")]
    assert documents(this, "title") == [[84, 256], [85, 256]]
    assert documents(this, "text") == [[97, 98, 256]]


def test_a_key_named_twice(job: Callable[..., PreprocessJob]):
    with pytest.raises(MtError, match="--json-keys: names a key twice: text text"):
        preprocess(job('{"text": "a"}', encoding=replace(BYTES, keys=("text", "text"))))


BAD_LINES = [
    ('{"text": "b"', "is not JSON: Expecting ',' delimiter at column 13"),
    ("", "is blank"),
    ("  \r", "is blank"),
    (b'{"text": "\xff"}', "is not UTF-8 at byte 11"),
    ('["b"]', "is a list, not an object"),
    ("3", "is a number, not an object"),
    ('{"txt": "b"}', "has no key 'text', only 'txt'"),
    ("{}", "has no key 'text', only none"),
    ('{"text": null}', "key 'text' is null, not a text"),
    ('{"text": ["b", 3]}', "key 'text' is a list with a number, not a text"),
    ('{"text": "b\\ud83d"}', "key 'text' holds half a surrogate pair"),
    ("[" * 100_000, "is nested too deeply"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_stops_with_its_file_and_number(job: Callable[..., PreprocessJob], line: str | bytes, message: str):
    this = job('{"text": "a"}', line, '{"text": "c"}')
    with pytest.raises(MtError) as error:
        preprocess(this)
    assert str(error.value).startswith(f"{this.inputs[0]}:2: {message}")
    assert written(this) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines_are_skipped_and_counted(job: Callable[..., PreprocessJob], workers: int):
    lines = [part for line, _ in BAD_LINES for part in (line, '{"text": "good"}')]
    report = preprocess(this := job(*lines, on_error="skip", workers=workers))
    assert documents(this) == [[*b"good", 256]] * len(BAD_LINES)
    assert (report.documents, report.skipped) == (len(BAD_LINES), len(BAD_LINES))
    assert [problem.where for problem in report.examples] == [f"{this.inputs[0]}:{n}" for n in (1, 3, 5, 7, 9)]


def test_lines_are_numbered_across_chunks(tmp_path: Path):
    path = tmp_path / "many.txt"
    lines = [b"%d" % n * (n % 700) for n in range(1, 12_001)] + [b"x" * 3_000_000, b"end"]
    path.write_bytes(b"\n".join(lines))
    chunks = list(read_chunks(path))
    assert [line for chunk in chunks for line in chunk.lines] == lines
    assert all(lines[chunk.first - 1] == chunk.lines[0] for chunk in chunks)
    assert len(chunks) > 3
    path.write_bytes(b"a\n")
    assert [chunk.lines for chunk in read_chunks(path)] == [[b"a"]]


def test_missing_inputs_are_named_together(job: Callable[..., PreprocessJob], tmp_path: Path):
    this = job('{"text": "a"}', inputs=(tmp_path / "inn.jsonl", tmp_path / "no" / "x.jsonl"))
    with pytest.raises(MtError) as error:
        preprocess(this)
    assert str(error.value).splitlines() == [
        f"{tmp_path}/inn.jsonl: no such file; did you mean {tmp_path}/in.jsonl?",
        f"{tmp_path}/no/x.jsonl: no such file; its folder {tmp_path}/no does not exist either",
    ]


RUN = """
import resource, sys
from pathlib import Path
from mt_core.errors import MtError
from mt_data.config import TokenizerConfig
from mt_data.preprocess.encoding import EncodingOptions
from mt_data.preprocess.job import PreprocessJob
from mt_data.preprocess.run import preprocess

if __name__ == "__main__":
    full, source, prefix, workers = sys.argv[1:]
    if full:  # every write beyond fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(full), int(full)))
    print("begin", flush=True)
    try:
        preprocess(PreprocessJob((Path(source),), prefix, EncodingOptions(TokenizerConfig(type="bytes")), int(workers)))
    except MtError as err:
        sys.exit(f"mt: {err}")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "run.py").write_text(RUN)
    return tmp_path / "run.py"


@pytest.mark.parametrize("full", ["40000", "4000"], ids=["at the .idx", "at the tokens"])
def test_a_full_disk_leaves_nothing(job: Callable[..., PreprocessJob], script: Path, full: str):
    this = job(*['{"text": "a"}'] * 5_000)  # 10,000 bytes of tokens, 20,000 of lengths; the .idx has 100,042
    command = [sys.executable, script, full, this.inputs[0], this.output_prefix, "1"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr == (
        f"mt: {this.output_prefix}.preprocess.tmp: the disk is full; free some space and run again; "
        "nothing was committed\n"
    )
    assert written(this) == []


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_interrupt_leaves_nothing(tmp_path: Path, script: Path, workers: str):
    source = tmp_path / "in.jsonl"
    command = [sys.executable, script, "", source, tmp_path / "out", workers]
    source.write_text('{"text": "a text of some length"}\n' * 2_000_000)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("out*.tmp")):
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert list(tmp_path.glob("out*")) == []


def die_at(bad: int, item: int) -> int:  # runs in a worker
    if item == bad:
        os.kill(os.getpid(), signal.SIGKILL)
    return item * 2


def die_once(at: int, marker: Path, item: int) -> int:  # runs in a worker
    if item == at and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return item * 2


def test_what_a_killed_worker_had_is_done_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    doubled = list(ordered_map(partial(die_once, 20, tmp_path / "died"), range(100), workers=2))
    assert doubled == [2 * item for item in range(100)]
    assert capfd.readouterr().err == "a worker process was killed; its part is done again\n"


def test_workers_that_are_killed_again_and_again_are_told():
    with pytest.raises(MtError, match="a worker process: was killed, 3 times in a row; the machine may be out of mem"):
        list(ordered_map(partial(die_at, 20), range(100), workers=2))


def test_the_order_is_kept_and_reading_never_runs_far_ahead():
    read = []

    def items():
        for n in range(60):
            read.append(n)
            yield n

    for done, value in enumerate(ordered_map(abs, items(), workers=2), start=1):
        assert value == done - 1
        assert len(read) - done <= 6


def test_an_old_output_is_replaced(job: Callable[..., PreprocessJob]):
    preprocess(job('{"text": "old"}'))
    preprocess(this := job('{"text": "new"}'))
    assert documents(this) == [[*b"new", 256]]


def test_a_failed_run_keeps_the_old_output(job: Callable[..., PreprocessJob]):
    preprocess(job('{"text": "old"}'))
    with pytest.raises(MtError, match="is not JSON"):
        preprocess(job("{"))
    assert documents(job("")) == [[*b"old", 256]]
    assert written(job("")) == ["out_text_document.bin", "out_text_document.idx"]
