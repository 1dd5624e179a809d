"""`mt train --data TEXT`: one command from a text to a run that can be resumed, evaluated and sampled from."""

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mt_cli.main import app
from mt_core.errors import MtError
from mt_data.indexed.reader import IndexedReader
from tiny import metrics

VERSE = "From fairest creatures we desire increase,\nThat thereby beauty's rose might never die.\n"
SMALL = ["model.layers=1", "model.hidden_size=32", "model.mlp.ffn_hidden_size=32", "data.seq_length=16"]
SMALL += ["batch.micro_batch=2", "batch.global_batch=2", "train.steps=2", "train.eval_every=2", "train.eval_batches=1"]
SMALL += ["model.max_seq_len=64", "runtime.threads=1"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty directory to work in, with a text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sonnets.txt").write_text(VERSE * 40, "utf-8")
    return tmp_path


def mt(*words: object) -> str:
    """Run a command in this process; what it prints on stdout and stderr."""
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def train(*words: object, overrides: list[str] = SMALL) -> str:
    return mt("train", *words, *(part for text in overrides for part in ("--set", text)))


def refusal(*words: object, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(MtError) as raised:
        train(*words, overrides=[*SMALL, *overrides])
    return str(raised.value)


def test_a_text_becomes_a_run_that_goes_on_is_evaluated_and_sampled_from(folder):
    printed = train("--data", "sonnets.txt")
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("mt: ")][:5] == [
        "tokenizer",
        "data",
        "model",
        "batch",
        "written",
    ]
    assert f"mt: data        sonnets.txt: 1 document, {len(VERSE) * 40 + 1:,} tokens, the last tenth" in printed
    run = folder / "sonnets-run"
    resolved = tomllib.loads((run / "config.toml").read_text())
    assert (resolved["model"]["vocab_size"], resolved["data"]["tokenizer"]["type"]) == (257, "bytes")
    assert resolved["data"]["train_paths"] == ["sonnets-run/data/train"]
    assert metrics(run)[-1]["valid_loss"] > 0
    again = mt("train", run / "config.toml", "--set", "train.steps=3")
    assert "mt: step 3 of 3 is in sonnets-run/step-00000003" in again
    assert mt("generate", run, "--prompt", "From ", "--max-new-tokens", 3).startswith("From ")
    assert "perplexity" in mt("eval", "perplexity", "--load-dir", run, "--data", "sonnets.txt")
    assert "mt: data        sonnets-run/data, made before from the same text" in train("--data", "sonnets.txt")


def test_a_single_document_is_cut_in_two_without_losing_a_token(folder):
    train("--data", "sonnets.txt")
    parts = [IndexedReader(f"sonnets-run/data/{name}") for name in ("train", "valid")]
    assert [len(part) for part in parts] == [1, 1]
    tokens = np.concatenate([part.get(0) for part in parts])
    assert bytes(tokens[:-1].tolist()) == (folder / "sonnets.txt").read_bytes()
    assert tokens[-1] == 256
    assert parts[1].token_count == round(len(tokens) * 0.1)


def test_many_documents_are_divided_and_a_name_without_a_suffix_is_text(folder):
    lines = [json.dumps({"text": f"{number} {VERSE}"}) for number in range(20)]
    (folder / "poems.jsonl").write_text("\n".join(lines), "utf-8")
    printed = train("--data", "poems.jsonl")
    assert "poems.jsonl: 20 documents, " in printed
    data = tomllib.loads((folder / "poems-run" / "data" / "run.toml").read_text())["data"]
    assert (data["paths"], data["split"]) == (["poems-run/data/all_text_document"], "0.9,0.1,0")
    (folder / "sonnets.txt").rename("verses")
    assert "verses: 1 document, " in train("--data", "verses")


def test_the_user_s_own_values_win_over_what_is_decided(folder):
    (folder / "mine.toml").write_text('preset = "gpt2-124m"\n[runtime]\nrun_dir = "mine"\n')
    overrides = [*SMALL, "model.attention.heads=2", "model.attention.num_kv_heads=2", "model.attention.head_size=16"]
    train("mine.toml", "--data", "sonnets.txt", overrides=[*overrides, "precision.dtype=fp32"])
    resolved = tomllib.loads((folder / "mine" / "config.toml").read_text())
    assert resolved["model"]["position"]["kind"] == "learned"
    assert (resolved["model"]["vocab_size"], resolved["batch"]["global_batch"]) == (257, 2)


def test_another_text_or_tokenizer_does_not_go_into_the_same_run(folder):
    train("--data", "sonnets.txt")
    changed = refusal("--data", "sonnets.txt", overrides=("data.tokenizer.type=NullTokenizer",))
    assert changed.startswith("sonnets-run/data: was not made from this tokenizer; choose another directory: --set")
    (folder / "sonnets.txt").write_text(VERSE, "utf-8")
    assert refusal("--data", "sonnets.txt").startswith("sonnets-run/data: was not made from this text; choose another")


@pytest.mark.parametrize(
    ("words", "overrides", "message"),
    [
        (["sonets.txt"], (), "--data sonets.txt: no such file; did you mean sonnets.txt?"),
        (["."], (), "--data .: a directory; a text file"),
        (["empty.txt"], (), "--data empty.txt: holds no text; a file with more of it"),
        (["sonnets.txt"], ("data.paths=['x']",), "data.paths: is given beside --data; leave one of them out"),
        (
            ["sonnets.txt", "--preset", "bert-345m"],
            (),
            "--data: a text, but data.kind is 'bert'; name prepared",
        ),
        (["latin.txt"], (), "latin.txt"),
        (["bad.jsonl"], (), "bad.jsonl:1: "),
    ],
)
def test_what_cannot_be_a_text_to_train_on(folder, words, overrides, message):
    (folder / "empty.txt").touch()
    (folder / "latin.txt").write_bytes("Größe".encode("latin-1"))
    (folder / "bad.jsonl").write_text('{"txt": "no such key"}\n')
    assert refusal("--data", *words, overrides=overrides).startswith(message)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) in ([], [f"{Path(words[0]).stem}-run"])
    assert not list(folder.glob("*/*"))


@pytest.mark.slow
def test_a_minute_of_shakespeare_learns_more_than_how_often_letters_come(folder, shared_data):
    text = shared_data / "tinyshakespeare.txt"
    train("--data", text, overrides=["train.steps=60", "train.eval_every=60", "runtime.threads=1"])
    shares = np.bincount(np.frombuffer(text.read_bytes(), np.uint8)) / text.stat().st_size
    entropy = -sum(share * np.log(share) for share in shares if share)
    lines = metrics(folder / "tinyshakespeare-run")
    assert lines[0]["loss"] == pytest.approx(np.log(257), abs=0.1)
    assert lines[-1]["valid_loss"] < entropy - 0.3
