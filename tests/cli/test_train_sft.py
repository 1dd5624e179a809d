"""Fine-tuning on conversations: what is counted, and what is said of samples that teach nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from chat_tokenizers import write_chat_tokenizer
from mt_cli.run_config import load_run_config
from mt_cli.train.compose import run
from mt_core.errors import MtError
from tiny import metrics, run_toml

ANSWERED = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "four"}]
TOO_LONG = [{"role": "user", "content": "x" * 100}, {"role": "assistant", "content": "never reached"}]


def write_run(tmp_path: Path, conversations: list[list[dict[str, str]]], **data: object) -> Path:
    corpus = tmp_path / "chat.jsonl"
    corpus.write_text("\n".join(json.dumps({"messages": messages}) for messages in conversations))
    tokenizer = write_chat_tokenizer(tmp_path / "tokenizer", pad_token="<|im_end|>")
    section = {"kind": "sft", "split": "1", "seq_length": 64, "tokenizer": tokenizer, **data}
    sections = {
        "data": section,
        "model": {"vocab_size": 272, "max_seq_len": 64},
        "train": {"steps": 2},
        "lr_schedule": {"warmup_steps": 1},
    }
    return run_toml(tmp_path / "run.toml", corpus, tmp_path / "run", **sections)


def test_speed_counts_what_is_computed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_run(tmp_path, [ANSWERED, ANSWERED, ANSWERED, TOO_LONG], max_untrained=0.25)
    assert run(load_run_config([path])) == 0
    assert "1 of 4 lines have no token to learn, conversation line 4 the first" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "tokens_per_s" in line]
    learnt = 3 * len(["f", "o", "u", "r", "<|im_end|>", "\n"])
    assert steps[-1]["tokens"] == 2 * learnt
    for line in steps:
        assert line["tokens_per_s"] / line["trained_tokens_per_s"] == pytest.approx(4 * 64 / learnt)


def test_a_step_that_teaches_nothing_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_run(tmp_path, [ANSWERED] * 4 + [TOO_LONG] * 4)
    with pytest.raises(MtError, match=r"chat\.jsonl: 4 of 8 lines have no token to learn, conversation line 5"):
        run(load_run_config([path]))
    assert run(load_run_config([path], ["data.max_untrained=0.5"])) == 0
    assert "warning: step 2 has no token to learn in its 4 samples; a longer" in capsys.readouterr().err


@pytest.mark.slow
def test_packed_sft_with_3_stages(tmp_path: Path):
    """Masks of conversations, positions, loss masks and dropout keys reach the first, the middle and the last stage."""
    lengths = (3, 11, 2, 7, 5, 13, 1, 4)
    talks = [[{"role": "user", "content": "ab" * n}, {"role": "assistant", "content": "yes " * n}] for n in lengths]
    path = write_run(tmp_path, talks * 4)
    alike = ["model.layers=3", "model.dropout.hidden=0.1", "precision.dtype=fp64", "data.seq_length=128"]
    alike += ["model.max_seq_len=128", "train.steps=3", "batch.micro_batch=1"]
    assert run(load_run_config([path], [*alike, f"runtime.run_dir={tmp_path / 'one'}"])) == 0
    stages = [*alike, "parallel.pipeline=3", f"runtime.run_dir={tmp_path / 'three'}"]
    arguments = ["train", path, "--nproc", 3, *(word for each in stages for word in ("--set", each))]
    done = subprocess.run([sys.executable, "-m", "mt_cli", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, three = (metrics(tmp_path / name) for name in ("one", "three"))
    assert [line["tokens"] for line in three if "loss" in line] == [line["tokens"] for line in one if "loss" in line]
    assert len([line for line in one if "loss" in line]) == 3
    for a, b in zip(one, three, strict=True):
        for name in ("loss", "grad_norm"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-12)
