"""Killed anywhere, the same command goes on and gives the same bytes; anything that changed makes it start over."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from mt_core.errors import MtError
from mt_data.config import TokenizerConfig
from mt_data.preprocess.encoding import EncodingOptions
from mt_data.preprocess.job import PreprocessJob
from mt_data.preprocess.journal import Journal
from mt_data.preprocess.run import preprocess

RUN = """
import sys
from pathlib import Path
from mt_data.config import TokenizerConfig
from mt_data.preprocess.encoding import EncodingOptions
from mt_data.preprocess.job import PreprocessJob
from mt_data.preprocess.run import preprocess

if __name__ == "__main__":
    inputs, prefix, workers, partitions = sys.argv[1].split(","), *sys.argv[2:]
    encoding = EncodingOptions(TokenizerConfig(type="bytes"), ("text", "title"), append_eod=True)
    sources, shares = tuple(map(Path, inputs)), int(partitions)
    job = PreprocessJob(sources, prefix, encoding, int(workers), partitions=shares, shard_bytes=1 << 20)
    preprocess(job)
"""


@cache
def draw_documents(number: int) -> str:
    """JSON lines of a kilobyte each on average."""
    draw, lines = random.Random(1), []
    for n in range(number):
        words = " ".join(str(draw.random()) for _ in range(draw.randrange(0, 100)))
        lines.append(json.dumps({"text": words, "title": str(n)}) + "\n")
    return "".join(lines)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Twelve megabytes, long enough to be killed in."""
    (path := tmp_path / "in.jsonl").write_text(draw_documents(12_000))
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Four megabytes, for jobs that stop by themselves."""
    (path := tmp_path / "in.jsonl").write_text(draw_documents(4_000))
    return path


def make_job(source: Path, prefix: Path, **changes: object) -> PreprocessJob:
    encoding = EncodingOptions(TokenizerConfig(type="bytes"), ("text", "title"), append_eod=True)
    job = PreprocessJob((source,), str(prefix), encoding, shard_bytes=1 << 20)
    return replace(job, **changes)  # pyright: ignore[reportArgumentType]


def outputs(prefix: Path) -> dict[str, bytes]:
    return {p.name.removeprefix(prefix.name): p.read_bytes() for p in prefix.parent.glob(f"{prefix.name}_*")}


def marks(prefix: Path) -> int:
    path = Journal(str(prefix)).folder / "journal.jsonl"
    return max(0, len(path.read_text().splitlines()) - 1) if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "partitions", "suffix"), [(1, 1, ""), (2, 1, ""), (1, 3, ""), (1, 1, ".gz")])
def test_killed_at_random_points_it_goes_on_to_the_same_bytes(
    source: Path, tmp_path: Path, workers: int, partitions: int, suffix: str
):
    if suffix:
        subprocess.run(["gzip", "-1", source], check=True)
        source = source.with_name(source.name + suffix)
    whole, prefix = tmp_path / "whole", tmp_path / "out"
    preprocess(make_job(source, whole, partitions=partitions))
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, tmp_path / "run.py", source, prefix, str(workers), str(partitions)]
    draw, seen, notes = random.Random(workers + partitions), 0, ""
    for _ in range(3):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        goal = seen + draw.randrange(1, 4)
        while marks(prefix) < goal and process.poll() is None:
            time.sleep(0.002)
        time.sleep(draw.random() / 50)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        notes += process.communicate()[1]
        visible = outputs(prefix)  # if it was killed so late that files were getting their names, these are whole
        assert visible.items() <= outputs(whole).items()
        assert visible or marks(prefix) >= seen  # nothing that was finished is done again
        seen = marks(prefix)
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "goes on after" in notes + ran.stderr
    assert outputs(prefix) == outputs(whole)
    assert len(outputs(prefix)) == 4
    assert not Journal(str(prefix)).folder.exists()


def stopped(job: PreprocessJob) -> None:
    """Run a job into its bad last line, after some shards are in the journal."""
    with pytest.raises(MtError, match="is not JSON"):
        preprocess(job)
    assert Journal(job.output_prefix).folder.exists()


@pytest.fixture
def broken(small: Path) -> Path:
    with small.open("a") as file:
        file.write("{")
    return small


def test_an_error_keeps_what_is_done_and_skipping_goes_on(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    stopped(job := make_job(broken, tmp_path / "out"))
    assert "keeps what is done; the same command goes on from there" in capsys.readouterr().err
    report = preprocess(replace(job, on_error="skip"))
    assert "goes on after" in capsys.readouterr().err
    assert (report.documents, report.skipped) == (4_000, 1)
    assert 0 < report.resumed_bytes < report.bytes == broken.stat().st_size
    preprocess(replace(job, on_error="skip", output_prefix=str(tmp_path / "whole")))
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("inputs", {}),
        ("options", {"partitions": 2}),
        ("options", {"max_line_mb": 1}),
        ("options", {"encoding": EncodingOptions(TokenizerConfig(type="bytes"), ("text", "title"))}),
        ("tokenizer", {"encoding": EncodingOptions(TokenizerConfig(type="NullTokenizer", vocab_size=9), ("text",))}),
    ],
)
def test_a_journal_of_another_job_is_discarded_with_a_note(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, changes: dict[str, object]
):
    stopped(job := make_job(broken, tmp_path / "out"))
    if what == "inputs":
        os.utime(broken, (1, 1))
    capsys.readouterr()
    with pytest.raises((MtError, ValueError)):
        preprocess(replace(job, **changes))  # pyright: ignore[reportArgumentType]
    assert f"an earlier run is not continued, as it is of another job: {what}" in " ".join(
        capsys.readouterr().err.replace("tokenizer, options", "tokenizer").split()
    )


def test_a_journal_that_skipped_lines_does_not_serve_a_run_that_stops(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source.write_text("{\n" + source.read_text() + '{"text": "a", "title": "b"}\n' * 50_000)
    job = make_job(source, tmp_path / "out", on_error="skip")
    journal = Journal(job.output_prefix)
    (tmp_path / "run.py").write_text(RUN.replace("shard_bytes", "on_error='skip', shard_bytes"))
    command = [sys.executable, tmp_path / "run.py", source, tmp_path / "out", "1", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while marks(tmp_path / "out") < 1:
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.communicate()
    with pytest.raises(MtError, match=r"in\.jsonl:1: is not JSON"):
        preprocess(replace(job, on_error="stop"))
    assert "as it is one that skipped lines" in capsys.readouterr().err
    assert not journal.folder.exists()


def test_files_shorter_than_the_journal_says_start_over(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    stopped(job := make_job(broken, tmp_path / "out"))
    os.truncate(Journal(job.output_prefix).folder / "0.0.tokens", 10)
    report = preprocess(replace(job, on_error="skip"))
    assert "as it is damaged: its files are shorter than its journal says" in capsys.readouterr().err
    assert (report.documents, report.resumed_bytes) == (4_000, 0)


def test_two_runs_at_once_are_refused(small: Path, tmp_path: Path):
    job = make_job(small, tmp_path / "out")
    first = Journal(job.output_prefix)
    first.open({})
    with pytest.raises(MtError, match=r"out\.preprocess\.tmp: is in use by another run; wait for it"):
        preprocess(job)
    first.close()
    preprocess(job)


@pytest.mark.parametrize("named", [0, 1, 2, 3])
def test_killed_while_files_get_their_names(small: Path, tmp_path: Path, named: int, monkeypatch: pytest.MonkeyPatch):
    """The renames are bin, idx, bin, idx; the run stops after some of them."""
    job, real, done = make_job(small, tmp_path / "out"), Path.replace, []

    def replace_some(self: Path, target: Path) -> Path:
        if len(done) == named:
            raise KeyboardInterrupt
        done.append(target)
        return real(self, target)

    preprocess(replace(job, output_prefix=str(tmp_path / "whole")))
    monkeypatch.setattr(Path, "replace", replace_some)
    with pytest.raises(KeyboardInterrupt):
        preprocess(job)
    monkeypatch.undo()
    report = preprocess(job)
    assert report.resumed_bytes == report.bytes
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")
