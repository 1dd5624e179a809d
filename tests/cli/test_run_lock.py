"""One run at a time in a run directory: who is refused, who takes over, and that nothing is left behind."""

import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mt_cli.train import run_lock
from mt_cli.train.run_lock import LOCK, lock_run, read_boot, read_process
from mt_core.errors import MtError

entered = []
"""Locks that a forked process has until it is killed."""


@pytest.fixture
def process() -> Iterator[Callable[[Callable[[], object]], int]]:
    """Fork a process that does something and then sleeps; ended with the test."""
    started = []

    def start(work: Callable[[], object]) -> int:
        ready, done = os.pipe()
        pid = os.fork()
        if pid == 0:
            work()
            os.write(done, b".")
            signal.pause()
        assert os.read(ready, 1) == b"."
        started.append(pid)
        return pid

    yield start
    for pid in started:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def write(run_dir: Path, **changes: object) -> None:
    """A lock's content, as a process that is gone would have left it."""
    holder = {"host": socket.gethostname(), "boot": read_boot(), "pid": os.getpid(), "started": "1", "since": 0.0}
    (run_dir / LOCK).write_text(json.dumps(holder | changes))


def enter(run_dir: Path) -> None:
    entered.append(lock_run(run_dir))
    entered[-1].__enter__()


def test_the_lock_says_who_has_it_and_goes_with_its_run(tmp_path):
    with lock_run(tmp_path):
        holder = json.loads((tmp_path / LOCK).read_text())
        assert (holder["host"], holder["pid"]) == (socket.gethostname(), os.getpid())
        assert holder["since"] == pytest.approx(time.time(), abs=60)
        assert "run lock" in {thread.name for thread in threading.enumerate()}
    assert list(tmp_path.iterdir()) == []
    assert "run lock" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("error", [MtError("x", "y"), KeyboardInterrupt(), SystemExit(3)])
def test_the_lock_goes_whatever_ends_the_run(tmp_path, error):
    with pytest.raises(type(error)), lock_run(tmp_path):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_is_refused_and_told_who_has_the_directory(tmp_path, process):
    pid = process(lambda: enter(tmp_path))
    with pytest.raises(MtError) as refusal, lock_run(tmp_path):
        pass
    since = time.strftime("%Y-%m-%d %H:", time.localtime())
    begin = f"{tmp_path}: is in use by another run: process {pid} on {socket.gethostname()}, since {since}"
    assert str(refusal.value).startswith(begin)
    assert str(refusal.value).endswith("; wait for it, stop it, or choose another runtime.run_dir")
    assert (tmp_path / LOCK).exists(), "it is still the first's"


def test_a_second_run_of_the_same_process_is_refused(tmp_path):
    with lock_run(tmp_path), pytest.raises(MtError, match=f"process {os.getpid()} on"), lock_run(tmp_path):
        pass


@pytest.mark.parametrize("locks", [True, False], ids=["with locks", "without locks"])
def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path, process, request, locks):
    if not locks:
        request.getfixturevalue("no_locks")
    pid = process(lambda: enter(tmp_path))
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # a zombie, as a careless launcher leaves it
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == pid
    with lock_run(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


@pytest.fixture
def no_locks(monkeypatch) -> None:
    """A file system without locks."""

    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("no_locks")
def test_without_the_kernel_s_locks_the_content_decides(tmp_path, process):
    pid = process(lambda: None)
    write(tmp_path, pid=pid, started=read_process(pid)[1])
    with pytest.raises(MtError, match=f"process {pid} on"), lock_run(tmp_path):
        pass
    write(tmp_path, pid=pid, started="1")  # another process got the number of the dead one
    with lock_run(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_locks")
def test_without_them_another_container_s_numbers_mean_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_lock, "SILENCE_S", 0.3)
    write(tmp_path, host="container", pid=2**22 + 1)
    with lock_run(tmp_path):
        assert "was left by process 4194305 on container" in capsys.readouterr().err


def test_a_container_that_was_started_anew_under_another_name_waits_for_nothing(tmp_path, capsys):
    write(tmp_path, host="container", pid=1, started=None)
    with lock_run(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("host", ["elsewhere", socket.gethostname()], ids=["another name", "a clone's name"])
def test_a_run_on_another_host_that_gives_signs_is_refused_with_the_way_out(tmp_path, monkeypatch, capsys, host):
    monkeypatch.setattr(run_lock, "SILENCE_S", 20.0)
    monkeypatch.setattr(run_lock, "RENEW_S", 0.1)
    write(tmp_path, host=host, boot="another", pid=7)
    ended = threading.Event()
    handle = os.open(tmp_path / LOCK, os.O_RDWR)
    elsewhere = threading.Thread(target=run_lock._renew, args=(handle, ended))
    elsewhere.start()
    with pytest.raises(MtError) as refusal, lock_run(tmp_path):
        pass
    ended.set()
    elsewhere.join()
    os.close(handle)
    assert f"is in use by another run: process 7 on {host}, since 1970-01-01" in str(refusal.value)
    assert str(refusal.value).endswith(f"; if that process is gone, remove {tmp_path / LOCK}")
    assert f"was left by process 7 on {host}" in capsys.readouterr().err


@pytest.mark.parametrize("locked", [False, True])
def test_a_run_on_another_host_without_a_sign_has_left_its_lock(tmp_path, monkeypatch, process, locked):
    monkeypatch.setattr(run_lock, "SILENCE_S", 0.3)
    if locked:  # the file server still has the dead host's lock
        process(lambda: enter(tmp_path))
    write(tmp_path, host="elsewhere", boot="another", pid=7)
    with lock_run(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_lock_without_a_name_is_waited_for(tmp_path, process, monkeypatch):
    monkeypatch.setattr(run_lock, "HANDOVER_S", 0.3)
    process(lambda: enter(tmp_path))
    (tmp_path / LOCK).write_text("")
    with pytest.raises(MtError, match="is in use by another run; wait for it"), lock_run(tmp_path):
        pass


def test_a_full_disk_is_one_line_and_leaves_no_lock(tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MtError, match="the disk is full"), lock_run(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MtError, match="a part of this path is a file"), lock_run(tmp_path / "file"):
        pass
