"""Every file that `mt eval` and `mt generate` open, in every bad state: one line that says where and what."""

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from bad_inputs import DIGITS, assert_one_clean_line, bad_directories, bad_files, fill_disk, run_mt

TEXT = "It was the best of times, it was the worst of times. " * 4
PASSAGES = [{"text": "one two three"}, {"text": "It was the best of times"}, {"text": "ünd nun ßehr"}]
ALWAYS_WRONG = ("missing", "directory for a file", "no permission", "not UTF-8", "empty")
TASKS = ("lambada", "wikitext103", "perplexity")
Write = Callable[[Path], None]


def write_lines(path: Path) -> None:
    path.write_text("".join(json.dumps(passage) + "\n" for passage in PASSAGES))


def write_text(path: Path) -> None:
    path.write_text(TEXT + "\nünd nun\n", "utf-8")


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": [passage["text"] for passage in PASSAGES]}), path)


def write_packed(path: Path) -> None:
    pack = gzip.compress if path.suffix == ".gz" else zstandard.ZstdCompressor().compress
    path.write_bytes(pack((TEXT + "\n").encode()))


FILES: dict[str, dict[str, Write]] = {
    "lambada": {"a.jsonl": write_lines},
    "wikitext103": {"a.txt": write_text, "a.txt.gz": write_packed, "a.txt.zst": write_packed},
    "perplexity": {"a.txt": write_text, "a.jsonl": write_lines, "a.parquet": write_parquet, "a.txt.gz": write_packed},
}


@pytest.mark.parametrize("task", TASKS)
def test_texts_to_evaluate_on(tmp_path: Path, checkpoint: Path, task: str):
    command = ["eval", task, "--load-dir", checkpoint, "--device", "cpu", "--data"]
    for name, write in FILES[task].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name)
        right = run_mt(*command, tmp_path / name)
        assert right.returncode == 0, right.stderr
        for fault, path in bad_files(tmp_path, tmp_path / name):
            must_fail = fault.startswith(ALWAYS_WRONG) or "huge integer" in fault
            must_fail &= not (fault.startswith("not UTF-8") and name.endswith("parquet"))
            assert_one_clean_line(run_mt(*command, path), f"{task}, {fault}", may_succeed=not must_fail)


def test_prompts(tmp_path: Path, checkpoint: Path):
    command = ["generate", checkpoint, "--device", "cpu", "--max-new-tokens", 1]
    for name, write in {"a.txt": lambda path: path.write_text("ünd\nnun\n", "utf-8"), "a.txt.gz": write_gzip}.items():
        write(tmp_path / name)
        right = run_mt(*command, "--prompt-file", tmp_path / name)
        assert right.returncode == 0, right.stderr
        for fault, path in bad_files(tmp_path, tmp_path / name):
            may_succeed = fault.startswith("truncated")
            assert_one_clean_line(run_mt(*command, "--prompt-file", path), fault, may_succeed=may_succeed)
    assert_one_clean_line(run_mt(*command, "--prompt", "a\udcff"), "a prompt that is not UTF-8")


def write_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress("ünd\nnun\n".encode()))


@pytest.mark.parametrize("name", ["eval", "generate"])
def test_the_tokenizer_beside_a_checkpoint(tmp_path: Path, checkpoint: Path, name: str):
    write_text(tmp_path / "a.txt")
    run = tmp_path / "run"
    evaluate = ["eval", "perplexity", "--load-dir", run, "--device", "cpu", "--data", tmp_path / "a.txt"]
    continue_text = ["generate", run, "--device", "cpu", "--prompt", "It was", "--max-new-tokens", 1]
    command = evaluate if name == "eval" else continue_text
    folder = next(path for path in checkpoint.rglob("mt_tokenizer.json")).parent
    for fault, path in bad_directories(tmp_path, folder):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(checkpoint, run)
        place = run / folder.relative_to(checkpoint)
        shutil.rmtree(place)
        if path.exists():
            path.rename(place)
        assert_one_clean_line(run_mt(*command), f"{name}, {fault}", may_succeed=True)
        if place.exists():
            place.chmod(0o700)


def test_results_that_cannot_be_written(tmp_path: Path, checkpoint: Path, small_disk: Path):
    write_text(tmp_path / "a.txt")
    sealed = tmp_path / "sealed"
    sealed.mkdir()
    sealed.chmod(0o500)
    fill_disk(small_disk)
    command = ["eval", "perplexity", "--load-dir", checkpoint, "--device", "cpu", "--data", tmp_path / "a.txt"]
    for output in (sealed / "r.json", tmp_path / "a.txt" / "r.json", tmp_path):  # before the work
        assert_one_clean_line(run_mt(*command, "--output", output), str(output))
    done = run_mt(*command, "--output", small_disk / "r.json")
    note, *rest = done.stderr.splitlines()
    assert note.startswith("perplexity: ")
    assert_one_clean_line(replace(done, stderr="\n".join(rest)))
    assert "r.json: the disk is full" in rest[0]


def test_a_number_that_python_does_not_read(tmp_path: Path, checkpoint: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "It was"}\n{"text": "the best", "unused": ' + "9" * DIGITS + "}\n")
    for task in ("lambada", "perplexity"):
        done = run_mt("eval", task, "--load-dir", checkpoint, "--device", "cpu", "--data", path)
        assert_one_clean_line(done)
        assert f"mt: {path}:2: holds a whole number of more than 4,300 digits" in done.stderr
