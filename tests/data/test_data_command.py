"""`mt data` as a user types it."""

import subprocess
import sys
from pathlib import Path

import pytest


def mt(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "mt_cli", "data", *args], capture_output=True, text=True)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "ab", "title": "T"}\n{"text": "", "title": "U"}\n')
    return path


def test_preprocess_takes_several_values_an_option_as_megatron_does(lines: Path, tmp_path: Path):
    ran = mt(
        *("preprocess", "--input", lines, lines, "--json-keys", "text", "title", "--tokenizer-type", "bytes"),
        *("--output-prefix", tmp_path / "new" / "out", "--append-eod", "--workers", "1"),
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    rows = dict(line.split("  ", 1) for line in ran.stdout.splitlines())
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    assert rows["documents"] == "4"
    assert rows["skipped lines"] == "0"
    assert rows[f"{tmp_path}/new/out_text_document"] == "6 tokens, 2 empty documents"
    assert rows[f"{tmp_path}/new/out_title_document"] == "8 tokens, 0 empty documents"
    assert "MB/s" in rows["speed"]


def test_a_malformed_line_is_one_message_and_exit_code_2(lines: Path, tmp_path: Path):
    with lines.open("a") as file:
        file.write("{oops\n" * 7)
    command = ["preprocess", "--input", lines, "--tokenizer-type", "bytes", "--output-prefix", tmp_path / "out"]
    ran = mt(*command)
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr.startswith(f"mt: {lines}:3: is not JSON: ")
    assert ran.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [lines]

    ran = mt(*command, "--on-error", "skip")
    assert ran.returncode == 0
    assert "skipped lines" in ran.stdout
    assert [line.split(": ")[0] for line in ran.stderr.splitlines()] == [
        *(f"skipped {lines}:{n}" for n in range(3, 8)),
        "skipped 2 more lines",
    ]


def test_from_text_to_a_trained_tokenizer_to_documents(lines: Path, tmp_path: Path):
    trained = mt(
        "train-tokenizer", "--input", lines, "--json-key", "text", "--vocab-size", "258", "--output-dir", tmp_path / "t"
    )
    assert trained.returncode == 0, trained.stderr
    assert {line.split()[0]: line.split()[1] for line in trained.stdout.splitlines()} == {
        "tokenizer": str(tmp_path / "t"),
        "vocabulary": "258",
        "eod": "257",
    }
    made = mt(
        *("preprocess", "--input", lines, "--output-prefix", tmp_path / "out", "--append-eod"),
        *("--tokenizer-model", tmp_path / "t"),
    )
    assert made.returncode == 0, made.stderr
    shown = mt("inspect", tmp_path / "out_text_document", "--document", "0", "--tokenizer-model", tmp_path / "t")
    assert shown.stdout.splitlines() == [
        "dtype      uint16",
        "documents  2 (1 empty)",
        "sequences  1",
        "tokens     2",
        "length     2 min, 2.0 mean, 2 max",
        ".bin       4 bytes",
        ".idx       70 bytes",
        "",
        "document 0: 2 tokens",
        "ab<|endoftext|>",
    ]
    ids = mt("inspect", tmp_path / "out_text_document", "--document", "0")
    assert ids.stdout.splitlines()[-1] == "256 257"
    outside = mt("inspect", tmp_path / "out_text_document", "--document", "2")
    assert outside.returncode == 2
    assert "--document: 2; 0 to 1, the documents of" in outside.stderr


def test_preprocess_imports_no_torch(lines: Path, tmp_path: Path):
    code = "import sys; sys.modules['torch'] = None; from mt_cli.main import main; main()"
    command = ["data", "preprocess", "--input", lines, "--tokenizer-type", "bytes", "--output-prefix", tmp_path / "out"]
    subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True)


def test_a_tokenizer_without_files(lines: Path, tmp_path: Path):
    ran = mt("preprocess", "--input", lines, "--output-prefix", tmp_path / "out")
    assert ran.returncode == 2
    assert ran.stderr.startswith("mt: GPT2BPETokenizer: needs vocab_file; give --vocab-file")


@pytest.mark.parametrize("command", ["preprocess", "train-tokenizer", "inspect"])
def test_help_imports_neither_numpy_nor_tokenizers(command: str):
    code = "import sys; sys.modules['numpy'] = sys.modules['tokenizers'] = None; from mt_cli.main import main; main()"
    ran = subprocess.run([sys.executable, "-c", code, "data", command, "--help"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "--" in ran.stdout


def test_small_inputs_are_not_worth_a_second_process(tmp_path: Path):
    from mt_data.preprocess.command import choose_worker_count

    (tmp_path / "small").write_bytes(b"x" * 1000)
    assert choose_worker_count([tmp_path / "small", tmp_path / "missing"]) == 1


def test_the_commands_of_the_readme_run(jsonl: Path, tmp_path: Path):
    readme = (Path(__file__).parents[2] / "packages" / "mt-data" / "README.md").read_text("utf-8")
    commands = [line.split()[1:] for line in readme.splitlines() if line.startswith("mt ")]
    assert [command[1] for command in commands] == ["train-tokenizer", "preprocess", "inspect"]
    jsonl.rename(tmp_path / "corpus.jsonl")
    for command in commands:
        ran = subprocess.run([sys.executable, "-m", "mt_cli", *command], cwd=tmp_path, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("Before we proceed any further, hear me speak.<|endoftext|>\n")
