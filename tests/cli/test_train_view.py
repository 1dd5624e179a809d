"""What a person sees of a run on a terminal; without one, plain lines are asserted elsewhere."""

import os
import pty
import re
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from mt_core.progress import ECHOCTL, LOCAL_MODES
from tiny import byte_corpus, run_toml


@pytest.fixture
def toml(tmp_path) -> Path:
    corpus = byte_corpus(tmp_path / "bytes_text_document")
    return run_toml(tmp_path / "run.toml", corpus, tmp_path / "run", train={"eval_every": 3, "eval_batches": 1})


def start(toml: Path, *words: str) -> tuple[subprocess.Popen[bytes], int, int]:
    """`mt train` on a terminal; the process, our end of the terminal and the other one."""
    parent_end, child_end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    command = [sys.executable, "-m", "mt_cli", "train", str(toml), *words]
    process = subprocess.Popen(command, stdin=child_end, stdout=child_end, stderr=child_end, env=environment)
    return process, parent_end, child_end


@pytest.mark.slow
def test_a_terminal_gets_the_lines_and_below_them_a_bar_with_loss_speed_and_time_left(toml):
    process, parent_end, child_end = start(toml)
    os.close(child_end)
    screen = read_until(parent_end)
    assert process.wait(timeout=60) == 0
    bar = screen.rsplit("training ", 1)[-1]
    for shown in ("6/6", "loss ", "valid ", "tokens/s", "0:00:00 left"):
        assert shown in bar
    lines = re.findall(r"^(?:\x1b\S*)*\r?(step \d/6 \| loss)", screen.replace("\x1b[2K", "\n"), re.MULTILINE)
    assert lines == [f"step {step}/6 | loss" for step in range(1, 7)]
    assert screen.index("mt: training a gpt of ") < screen.index("device ") < screen.index("step 1/6 | loss")
    assert screen.index("mt: step 6 of 6") < screen.rindex("\nspeed ") < screen.rindex("mt train ")


@pytest.mark.slow
def test_ctrl_c_leaves_one_bar_and_the_terminal_as_it_was(toml):
    process, parent_end, child_end = start(toml, "--set", "train.steps=5000")
    before = termios.tcgetattr(child_end)
    screen = read_until(parent_end, "step 3/5000 | loss")
    assert not termios.tcgetattr(child_end)[LOCAL_MODES] & ECHOCTL
    os.write(parent_end, b"\x03")  # the terminal would echo ^C into the bar
    process.send_signal(signal.SIGINT)  # which it sends to the group that it belongs to, as ours does not
    assert process.wait(timeout=60) == 130
    assert termios.tcgetattr(child_end) == before
    os.close(child_end)
    screen += read_until(parent_end)
    assert "^C" not in screen
    lines = [line.rpartition("\x1b[2K")[2] for line in re.sub(r"\x1b\[[0-9;]*m", "", screen).split("\n")]
    assert len([line for line in lines if line.startswith("training ")]) == 1
    assert "goes on" in lines[-2]


def read_until(handle: int, text: str = "\0") -> str:
    """What the other side writes until a text comes, or until it closes."""
    parts: list[bytes] = []
    while text.encode() not in b"".join(parts):
        try:
            part = os.read(handle, 4096)
        except OSError:  # Linux: the other side has closed
            break
        if not part:
            break
        parts.append(part)
    return b"".join(parts).decode(errors="replace")
