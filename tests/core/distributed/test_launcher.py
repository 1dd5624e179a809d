"""The launcher of one machine, with small scripts as ranks: signals, restarts, exit codes and the table."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mt_core.distributed.launcher import launch


@pytest.fixture(autouse=True)
def _short_notice(monkeypatch):
    """Ranks of these tests notice nothing by themselves."""
    monkeypatch.setattr("mt_core.distributed.launcher.NOTICE_S", 0.1)


HEAD = """
import os, signal, sys, time
from pathlib import Path
from mt_core.errors import MtError
from mt_core.distributed.environment import get_rank_info
from mt_core.distributed.exit_codes import RankFailure
from mt_core.distributed.rank_process import end_with
from mt_core.distributed.watchdog import supervised

info, run_dir = get_rank_info(), Path(sys.argv[1])

def work():
    with supervised(run_dir, info, 600) as heartbeat:
        heartbeat.update(7, "forward")
        time.sleep(0.3)
        return body(heartbeat)

"""


def script(tmp_path: Path, body: str) -> list[str]:
    """A rank that beats once and then runs `body`, as arguments of python."""
    file = tmp_path / "rank.py"
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    file.write_text(f"{HEAD}def body(heartbeat):\n{lines}\nend_with(work, info)\n")
    return [str(file), str(tmp_path)]


def test_ranks_that_end_well_give_0_and_no_table(tmp_path, capfd):
    body = "os.write(1, f'{info.rank} {info.world_size} {info.local_world_size}\\n'.encode())\nreturn 0"  # in one piece
    assert launch(script(tmp_path, body), 3, run_dir=tmp_path) == 0
    captured = capfd.readouterr()
    assert sorted(captured.out.splitlines()) == ["0 3 3", "1 3 3", "2 3 3"]
    assert captured.err == ""


@pytest.mark.parametrize(
    ("action", "code", "end", "message"),
    [
        (
            "raise ArithmeticError('made up')",
            1,
            "exit 1: failed with a traceback",
            "[rank 1]: ArithmeticError: made up",
        ),
        (
            "raise MtError('here', 'wrong', 'allowed: right')",
            2,
            "exit 2: refused its input",
            "[rank 1]: here: wrong; allow",
        ),
        (
            "raise RankFailure('rank 3 did not come', 3)",
            3,
            "exit 3: not all ranks came",
            "[rank 1]: rank 3 did not come",
        ),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "killed by SIGKILL", "mt: the run failed"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139, "killed by SIGSEGV", "Fatal Python error: Segmentation fault"),
        ("sys.exit(9)", 9, "exit 9", "mt: the run failed"),
    ],
)
def test_the_exit_code_is_the_cause_s_and_the_table_says_it(tmp_path, capfd, action, code, end, message):
    body = f"if info.rank == 1:\n    {action}\ntime.sleep(30)"
    assert launch(script(tmp_path, body), 2, run_dir=tmp_path) == code
    error = capfd.readouterr().err
    assert message in error
    rows = error.partition("where each rank was:\n")[2].splitlines()
    assert rows[0].split() == ["rank", "step", "phase", "since", "host", "pid", "end"]
    assert rows[1].startswith("0     7     forward")
    assert rows[1].endswith("stopped by the launcher (SIGTERM)")
    assert rows[2].startswith("1     7     forward")
    assert rows[2].endswith(end)


STUBBORN = """
if info.rank == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (run_dir / "ready").touch()
while not (run_dir / "ready").exists():
    time.sleep(0.01)
"""
"""Rank 0 does not end from SIGTERM, and the others go on when that is so."""


def test_a_rank_that_only_lost_another_is_not_the_cause(tmp_path, capfd):
    body = "if info.rank == 1:\n    os.kill(os.getpid(), signal.SIGABRT)\nraise RankFailure('lost another rank', 5)"
    assert launch(script(tmp_path, STUBBORN.strip() + "\n" + body), 2, run_dir=tmp_path) == 128 + signal.SIGABRT
    assert "exit 5: lost another rank" in capfd.readouterr().err


def test_a_rank_that_dies_slowly_is_the_cause_though_another_noticed_first(tmp_path, capfd):
    body = "if info.rank == 1:\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    (run_dir / 'deaf').touch()\n"
    body += "while not (run_dir / 'deaf').exists():\n    time.sleep(0.01)\n"
    body += "if info.rank == 0:\n    raise RankFailure('lost another rank', 5)\n"
    body += "time.sleep(0.5)\nos.kill(os.getpid(), signal.SIGKILL)"
    assert launch(script(tmp_path, body), 2, run_dir=tmp_path) == 128 + signal.SIGKILL
    assert "killed by SIGKILL" in capfd.readouterr().err


def test_a_rank_that_never_beat_is_in_the_table(tmp_path, capfd):
    assert launch(["-c", "import sys; sys.exit(3)"], 1, run_dir=tmp_path) == 3
    assert "0     -     -      -      -" in capfd.readouterr().err


def test_a_rank_that_ignores_the_end_of_another_is_killed(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("mt_core.distributed.launcher.GRACE_S", 0.3)
    body = "if info.rank == 1:\n    return 1\ntime.sleep(30)"
    assert launch(script(tmp_path, STUBBORN.strip() + "\n" + body), 2, run_dir=tmp_path) == 1
    assert "stopped by the launcher (SIGKILL)" in capfd.readouterr().err


def test_restarts_are_counted(tmp_path, capfd):
    body = "os.kill(os.getpid(), signal.SIGKILL)"
    assert launch(script(tmp_path, body), 1, run_dir=tmp_path, max_restarts=2) == 137
    error = capfd.readouterr().err
    assert error.count("mt: the run failed") == 3
    assert "mt: starting all ranks again; restarts left: 1\n" in error
    assert "mt: starting all ranks again; restarts left: 0\n" in error


def test_a_restart_that_ends_well_ends_the_run(tmp_path):
    body = "mark = run_dir / 'mark'\nif mark.exists():\n    return 0\nmark.touch()\nreturn 1"
    assert launch(script(tmp_path, body), 1, run_dir=tmp_path, max_restarts=5) == 0


def test_a_mistake_of_the_user_s_is_not_tried_again(tmp_path, capfd):
    assert launch(script(tmp_path, "raise MtError('a', 'b')"), 2, run_dir=tmp_path, max_restarts=5) == 2
    assert "starting all ranks again" not in capfd.readouterr().err


LAUNCHER = """
import sys
from pathlib import Path
from mt_core.distributed.launcher import launch
sys.exit(launch(sys.argv[1:], 2, run_dir=Path(sys.argv[2]), max_restarts=3))
"""

SAVING = """
from mt_core.training.signals import catch_stop_signals
with catch_stop_signals(insistent=False) as stop:
    (run_dir / f"ready-{info.rank}").touch()
    while stop.signal is None:
        time.sleep(0.01)
    time.sleep(SAVE)
    (run_dir / f"saved-{info.rank}").touch()
    return stop.exit_code
"""


def is_launched(tmp_path: Path, *, save_seconds: float) -> "subprocess.Popen[str]":
    """A launcher whose ranks save for some seconds when they are asked to stop."""
    words = script(tmp_path, SAVING.strip().replace("SAVE", str(save_seconds)))
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER, *words], stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while len(list(tmp_path.glob("ready-*"))) < 2:
        assert time.monotonic() < end
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_goes_to_all_ranks_which_save_as_long_as_they_need(tmp_path, number):
    process = is_launched(tmp_path, save_seconds=1)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    assert error == ""  # neither a table nor a restart
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    process = is_launched(tmp_path, save_seconds=60)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode in (128 + signal.SIGINT, 128 + signal.SIGKILL)
    assert not list(tmp_path.glob("saved-*"))


def test_ranks_whose_launcher_is_killed_save_and_leave(tmp_path):
    process = is_launched(tmp_path, save_seconds=0)
    process.kill()
    error = process.communicate(timeout=60)[1]  # ends when the ranks, too, have closed it
    assert "mt [rank 1]: the launcher is gone; saving and leaving" in error
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_ranks_end_past_the_interpreter_s_shutdown_with_their_output_flushed(tmp_path, capfd):
    body = "import atexit\natexit.register(lambda: print('shutdown'))\nsys.stdout.write('all')\nreturn 0"
    assert launch(script(tmp_path, body), 1, run_dir=tmp_path) == 0
    assert capfd.readouterr().out == "all"


def test_a_rank_s_output_may_be_cut_off(tmp_path):
    """As by `mt train … | head`: the exit code is still the run's own."""
    words = script(tmp_path, "sys.stdout.write('all')\nos.close(1)\nreturn 0")
    assert launch(words, 1, run_dir=tmp_path) == 0
