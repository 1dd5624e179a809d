"""What a person sees of a run on a terminal; without one, plain lines are asserted elsewhere."""

import os
import pty
import subprocess
import sys

from tiny import byte_corpus, run_toml


def test_a_terminal_gets_a_live_view_with_loss_speed_and_time_left(tmp_path):
    corpus = byte_corpus(tmp_path / "bytes_text_document")
    toml = run_toml(tmp_path / "run.toml", corpus, tmp_path / "run", train={"eval_every": 3, "eval_batches": 1})
    parent_end, child_end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    command = [sys.executable, "-m", "mt_cli", "train", str(toml)]
    process = subprocess.Popen(command, stdout=child_end, stderr=child_end, env=environment)
    os.close(child_end)
    screen = read_all(parent_end)
    assert process.wait(timeout=60) == 0
    last = screen.rsplit("training", 1)[-1]
    for shown in ("6/6", "loss ", "valid ", "tokens/s", "0:00:00 left"):
        assert shown in last
    assert "step 1/6 |" not in screen


def read_all(handle: int) -> str:
    """Everything the other side writes until it closes."""
    parts = []
    while True:
        try:
            part = os.read(handle, 4096)
        except OSError:  # Linux: the other side has closed
            break
        if not part:
            break
        parts.append(part)
    return b"".join(parts).decode()
