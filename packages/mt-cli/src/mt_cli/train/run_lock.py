"""RUN/run.lock: one run at a time in a run directory; whoever comes second is told who has it.

The kernel's lock on the file (flock) ends with the process, however that ends, and one kernel knows all its processes,
those of other containers as well. Where it cannot tell, the file's content decides: a process of this kernel is alive
if its number still belongs to a process that started at that time; one of another kernel, and so most often of another
host, if it still renews the file.

Torch-free, for the launcher.
"""

import fcntl
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mt_core.errors import MtError
from mt_core.files import disk_errors

LOCK, CONFIG, HEARTBEATS = "run.lock", "config.toml", "heartbeats"
RENEW_S = 5.0
"""How often the one who has the lock renews the file's time."""
SILENCE_S = 60.0
"""How long a process of another kernel is watched for that; network file systems may show it late."""
HANDOVER_S = 10.0
"""How long to wait for a lock whose process is gone: one that just took it writes its name, loader processes end."""
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class LockHolder:
    """Who has the lock."""

    host: str
    """For people: virtual machines and containers may share a name, or change theirs."""
    boot: str | None
    """The kernel's number of its start, which no two share; None where there is no /proc."""
    pid: int
    started: str | None
    """The start of the process as the kernel counts it, which tells it from a later one with its number."""
    since: float
    """Seconds since 1970."""

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, since {since}"

    @property
    def is_local(self) -> bool:
        """Whether this kernel ran it, since its last start."""
        return self.boot == read_boot() if self.boot else self.host == socket.gethostname()

    @property
    def is_alive(self) -> bool:
        """Whether this very process of this kernel still runs; one that ended and was not waited for does not."""
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            pass
        state, started = read_process(self.pid)
        return state not in ("Z", "X") and (self.started is None or started in (None, self.started))


@contextmanager
def lock_run(run_dir: Path) -> Iterator[None]:
    """Hold the run directory, which must exist; an `MtError` names the run that has it.

    A lock whose process is gone is taken over: at once on this kernel, after `SILENCE_S` without a sign from another.
    """
    path = run_dir / LOCK
    with disk_errors(path):
        handle = _acquire(path)
    ended = threading.Event()
    thread = threading.Thread(target=_renew, args=(handle, ended), name="run lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):
            if _is_current(handle, path):
                path.unlink()
        os.close(handle)


@contextmanager
def created_directory(directory: Path) -> Iterator[None]:
    """Make a directory; afterwards it and the folders made for it are gone if they are empty."""
    missing = _list_missing(directory)
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        _remove_empty(missing)


@contextmanager
def claim_run_directory(run_dir: Path) -> Iterator[None]:
    """Around the launch of several ranks: refuse a run directory in use before any rank is started.

    The heartbeats of a launch that failed before its first step, which the launcher reports, are removed in the end.
    """
    missing, had_heartbeats = _list_missing(run_dir), (run_dir / HEARTBEATS).exists()
    if not missing:
        with lock_run(run_dir):
            pass
    try:
        yield
    finally:
        if not had_heartbeats and not (run_dir / CONFIG).exists():
            shutil.rmtree(run_dir / HEARTBEATS, ignore_errors=True)
        _remove_empty(missing)


def _list_missing(directory: Path) -> list[Path]:
    """A directory and its folders as far as they do not exist, the innermost first."""
    return [path for path in (directory, *directory.parents) if not path.exists()]


def _remove_empty(directories: list[Path]) -> None:
    with suppress(OSError):
        for path in directories:
            path.rmdir()


def _renew(handle: int, ended: threading.Event) -> None:
    while not ended.wait(RENEW_S):
        with suppress(OSError):
            os.utime(handle)


def _acquire(path: Path) -> int:
    """Open and lock the file, with this process's name in it."""
    deadline = time.monotonic() + HANDOVER_S
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        locked = _try_lock(handle)
        holder = _read_holder(handle)
        if holder is not None and _is_in_use(path, holder, locked):
            os.close(handle)
            raise _describe(path, holder)
        if locked is False and holder is not None and not holder.is_local:
            path.unlink(missing_ok=True)  # a dead host's lock may stay with the server
        elif locked is not False and _is_current(handle, path):
            _write_holder(handle, path)
            if locked or _is_unchallenged(handle):
                return handle
        os.close(handle)
        if locked is False and time.monotonic() > deadline:
            raise _describe(path, holder)
        time.sleep(POLL_S)


def _is_in_use(path: Path, holder: LockHolder, locked: bool | None) -> bool:
    """Whether the one who wrote the file still runs; `locked` as `_try_lock` returns it."""
    if not holder.is_local:
        return _is_renewed(path, holder)
    if locked:
        return False
    if holder.is_alive:
        return True
    in_another_container = locked is None and holder.host != socket.gethostname()  # its numbers mean nothing here
    return in_another_container and _is_renewed(path, holder)


def _try_lock(handle: int) -> bool | None:
    """Whether the kernel gives the lock; None on a file system without locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _read_holder(handle: int) -> LockHolder | None:
    """Who wrote the file last; None if nobody did, or is about to."""
    try:
        return LockHolder(**json.loads(os.pread(handle, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _write_holder(handle: int, path: Path) -> None:
    _, started = read_process(os.getpid())
    holder = LockHolder(socket.gethostname(), read_boot(), os.getpid(), started, time.time())
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(asdict(holder)).encode() + b"\n", 0)
        os.fsync(handle)
    except OSError:  # a full disk
        path.unlink(missing_ok=True)
        os.close(handle)
        raise


def _is_unchallenged(handle: int) -> bool:
    """Whether this process's name is still in the file a moment later; two may have written it without locks."""
    time.sleep(POLL_S)
    holder = _read_holder(handle)
    return holder is not None and holder.is_local and holder.pid == os.getpid()


def _is_current(handle: int, path: Path) -> bool:
    """Whether the path still leads to the open file, and not to one that another process made after a removal."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(handle))


def _is_renewed(path: Path, holder: LockHolder) -> bool:
    """Whether a process elsewhere renews its file; its clock is not compared with this one's."""
    print(f"mt: {path.parent} was left by {holder}; watching {SILENCE_S:g} s for a sign of it", file=sys.stderr)
    first, deadline = path.stat().st_mtime_ns, time.monotonic() + SILENCE_S
    while time.monotonic() < deadline:
        time.sleep(min(RENEW_S, SILENCE_S) / 2)
        try:
            with path.open("rb") as file:  # opening asks a network file system's server anew
                if os.fstat(file.fileno()).st_mtime_ns != first:
                    return True
        except FileNotFoundError:
            return False
    return False


def _describe(path: Path, holder: LockHolder | None) -> MtError:
    if holder is None:
        return MtError(str(path.parent), "is in use by another run", "wait for it, or choose another runtime.run_dir")
    allowed = "wait for it, stop it, or choose another runtime.run_dir"
    if not holder.is_local:
        allowed += f"; if that process is gone, remove {path}"
    return MtError(str(path.parent), f"is in use by another run: {holder}", allowed)


def read_boot() -> str | None:
    """The kernel's number of its start; None where there is no /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def read_process(pid: int) -> tuple[str | None, str | None]:
    """A process's state, and its start in the kernel's ticks since it booted; None where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None, None
    return fields[0], fields[19]
