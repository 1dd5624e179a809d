"""Heartbeats, and a process that stops making progress: it says where it is and ends."""

import json
import os
import subprocess
import sys
import time
import timeit
from pathlib import Path

import pytest

from mt_core.distributed.environment import RankInfo
from mt_core.distributed.exit_codes import EXIT_STALLED
from mt_core.distributed.heartbeat import Heartbeat, heartbeat_file, read_heartbeat, write_heartbeat
from mt_core.distributed.watchdog import supervised

HANGING = """
import ctypes, sys, time
from pathlib import Path
from mt_core.distributed.environment import RankInfo
from mt_core.distributed import watchdog as watch
from mt_core.distributed.watchdog import supervised

watch.OTHERS_S, watch.BACKSTOP_S = 0.2, 0.5

def wait_in_python():
    time.sleep(60)

def wait_in_c():
    ctypes.PyDLL(None).sleep(60)  # PyDLL keeps the interpreter's lock: no thread of Python's can run

with supervised(Path(sys.argv[1]), RankInfo(3, 4, launched=True), 1.0) as heartbeat:
    heartbeat.update(17, sys.argv[3])
    globals()[sys.argv[2]]()
"""


def hang(run_dir: Path, function: str, phase: str = "backward", timeout: float = 30, **variables: str):
    command = [sys.executable, "-c", HANGING, str(run_dir), function, phase]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=os.environ | variables)


def test_a_beat_costs_no_more_than_looking_at_the_clock_twenty_times():
    """Some 0.5 microseconds; the ratio does not depend on the machine or its load."""
    heartbeat = Heartbeat()
    beats = min(timeit.repeat(lambda: heartbeat.update(1, "forward"), number=10_000))
    looks = min(timeit.repeat(time.monotonic, number=10_000))
    assert beats < 20 * looks


def test_a_heartbeat_says_who_is_where(tmp_path):
    heartbeat = Heartbeat()
    before = time.time()
    heartbeat.update(12, "reduce")
    write_heartbeat(tmp_path, RankInfo(3, 8), heartbeat)
    after = time.time()
    found = json.loads(heartbeat_file(tmp_path, 3).read_text())
    assert (found["rank"], found["ranks"], found["step"], found["phase"]) == (3, 8, 12, "reduce")
    assert found["pid"] == os.getpid()
    assert before - 0.001 <= found["time"] <= after + 0.001
    assert [file.name for file in tmp_path.iterdir()] == ["rank-00003.json"]


def test_a_heartbeat_of_an_earlier_process_is_not_taken_for_this_one_s(tmp_path):
    write_heartbeat(tmp_path, RankInfo(), Heartbeat())
    assert read_heartbeat(tmp_path, 0, os.getpid())
    assert read_heartbeat(tmp_path, 0, os.getpid() + 1) is None
    assert read_heartbeat(tmp_path, 1, os.getpid()) is None


def test_a_directory_that_is_gone_does_not_stop_training(tmp_path):
    write_heartbeat(tmp_path / "gone", RankInfo(), Heartbeat())
    assert not (tmp_path / "gone").exists()


def test_the_file_follows_the_heart_and_ends_with_done(tmp_path):
    with supervised(tmp_path, RankInfo(), 1.0) as heartbeat:
        heartbeat.update(1, "forward")
        end = time.monotonic() + 10
        while read_heartbeat(tmp_path / "heartbeats", 0, os.getpid())["phase"] != "forward":
            assert time.monotonic() < end
            heartbeat.update(1, "forward")
            time.sleep(0.02)
    assert read_heartbeat(tmp_path / "heartbeats", 0, os.getpid())["phase"] == "done"
    assert [file.name for file in (tmp_path / "heartbeats").iterdir()] == ["rank-00000.json"]


def test_after_an_error_the_last_heartbeat_stays(tmp_path):
    with pytest.raises(ZeroDivisionError), supervised(tmp_path, RankInfo(), 600) as heartbeat:
        heartbeat.update(4, "optimizer")
        heartbeat.step // 0
    found = read_heartbeat(tmp_path / "heartbeats", 0, os.getpid())
    assert (found["step"], found["phase"]) == (4, "optimizer")


def test_what_a_larger_run_left_is_removed(tmp_path):
    folder = tmp_path / "heartbeats"
    folder.mkdir()
    for name in ("rank-00001.json", "rank-00002.json", "rank-00002.stacks.txt", "stalled"):
        (folder / name).touch()
    with supervised(tmp_path, RankInfo(0, 2), 600):
        assert {"rank-00001.json"} == {file.name for file in folder.iterdir()} - {
            "rank-00000.json",
            "rank-00000.stacks.txt",
        }


def test_no_progress_writes_the_stacks_and_ends_with_its_own_code(tmp_path):
    done = hang(tmp_path, "wait_in_python")
    assert done.returncode == EXIT_STALLED
    where = (
        "no progress for 1 s (runtime.stall_timeout) in step 17, phase 'backward': it, or a rank it waits for, hangs"
    )
    assert f"mt [rank 3]: {where}" in done.stderr
    stacks = (tmp_path / "heartbeats" / "rank-00003.stacks.txt").read_text()
    assert "in wait_in_python" in stacks
    assert "in wait_in_python" in done.stderr
    assert "mt [rank 3]: step 17, phase 'backward', 1 s ago; stacks:" in done.stderr


def test_under_our_launcher_the_stacks_are_left_for_it_to_print(tmp_path):
    done = hang(tmp_path, "wait_in_python", MT_LAUNCHER=str(os.getpid()))
    assert "in wait_in_python" not in done.stderr
    assert "in wait_in_python" in (tmp_path / "heartbeats" / "rank-00003.stacks.txt").read_text()


def test_a_call_that_keeps_the_interpreter_s_lock_ends_too(tmp_path):
    done = hang(tmp_path, "wait_in_c")
    assert done.returncode == 1  # faulthandler's own
    assert "in wait_in_c" in (tmp_path / "heartbeats" / "rank-00003.stacks.txt").read_text()


def test_setting_up_may_take_as_long_as_it_takes(tmp_path):
    with pytest.raises(subprocess.TimeoutExpired):
        hang(tmp_path, "wait_in_python", "start", timeout=2.5)
