"""Every file that `mt task detoxify` opens, in every bad state: one line that says where and what."""

import json
from pathlib import Path

import pytest

from bad_inputs import assert_one_clean_line, bad_files, fill_disk, run_mt

TEXTS = ("You are kind.", "The train is late, ünd the bus too.", "Go away, you fool.")
LINES = {
    "text": [{"text": text} for text in TEXTS],
    "labelled": [{"text": text, "toxicity": n / 2} for n, text in enumerate(TEXTS)],
    "scored": [{"text": text, "scores": {"toxicity": n / 2}} for n, text in enumerate(TEXTS)],
    "prompt": [{"prompt": {"text": text, "toxicity": n / 2}} for n, text in enumerate(TEXTS)],
}
ALWAYS_WRONG = ("missing", "directory for a file", "no permission", "not UTF-8", "huge integer")


def write(path: Path, kind: str) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES[kind]), "utf-8")
    return path


def commands(folder: Path, checkpoint: Path) -> dict[str, list[object]]:
    """The command that opens each kind of file, which is its last word."""
    texts = write(folder / "texts.jsonl", "text")
    cpu = ["--device", "cpu", "--num-continuations", 1, "--max-new-tokens", 1, "--save-dir", folder / "e"]
    return {
        "text": ["score", "--output", folder / "a.jsonl", "--input"],
        "labelled": ["score", "--input", texts, "--output", folder / "b.jsonl", "--labelled-data"],
        "scored": ["filter", "--output", folder / "c.jsonl", "--keep", 1, "--input"],
        "prompt": ["evaluate", "--load-dir", checkpoint, *cpu, "--prompts"],
    }


@pytest.mark.parametrize("kind", LINES)
def test_files_in_every_bad_state(kind: str, tmp_path: Path, checkpoint: Path):
    example = write(tmp_path / "lines.jsonl", kind)
    command = ["task", "detoxify", *commands(tmp_path, checkpoint)[kind]]
    right = run_mt(*command, example)
    assert right.returncode == 0, right.stderr
    for fault, path in bad_files(tmp_path, example):
        must_fail = fault.startswith(ALWAYS_WRONG)
        assert_one_clean_line(run_mt(*command, path), f"{kind}, {fault}", may_succeed=not must_fail)


def test_a_third_party_s_scorer_has_options_too(tmp_path: Path, add_component, monkeypatch):
    (tmp_path / "mt_letters.py").write_text(
        "from typing import Annotated\n"
        "class Letters:\n"
        "    name, batch_size = 'letters', 2\n"
        "    def __init__(self, api_key, *, letter: Annotated[str, 'A letter.'] = 'u'):\n"
        "        self.letter, self.identity = letter, f'letters {letter}'\n"
        "    def score(self, texts):\n"
        "        return [{'toxicity': text.count(self.letter) / len(text)} for text in texts]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    add_component("toxicity-scorer", "letters", "mt_letters:Letters")
    texts, output = write(tmp_path / "texts.jsonl", "text"), tmp_path / "a.jsonl"
    words = ["task", "detoxify", "score", "--input", texts, "--output", output, "--scorer", "letters"]
    assert run_mt(*words, "--letter", "o").returncode == 0
    scored = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [(line["scorer"], line["scores"]["toxicity"]) for line in scored] == [
        ("letters", text.count("o") / len(text)) for text in TEXTS
    ]
    assert "--leter: scorer letters has no such option; did you mean '--letter'?" in run_mt(*words, "--leter", 1).stderr


def test_outputs_that_cannot_be_written(tmp_path: Path, checkpoint: Path, small_disk: Path):
    scored, texts = write(tmp_path / "scored.jsonl", "scored"), write(tmp_path / "texts.jsonl", "text")
    sealed = tmp_path / "sealed"
    sealed.mkdir()
    sealed.chmod(0o500)
    fill_disk(small_disk)
    for output in (sealed / "a.jsonl", texts / "a.jsonl", small_disk / "a.jsonl"):
        for words in (["filter", "--input", scored], ["score", "--input", texts]):
            done = run_mt("task", "detoxify", *words, "--output", output)
            assert_one_clean_line(done, f"{words[0]} {output}")
            assert done.returncode == 2
    for folder in (sealed / "e", texts / "e"):
        words = ["--load-dir", checkpoint, "--prompts", write(tmp_path / "p.jsonl", "prompt"), "--device", "cpu"]
        assert_one_clean_line(run_mt("task", "detoxify", "evaluate", *words, "--save-dir", folder), str(folder))
