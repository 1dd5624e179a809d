"""Ranks that watch themselves: heartbeats are written, and a rank without progress says where it is and ends.

A thread does both. Where the thread cannot run, because a call into C keeps the interpreter's lock, faulthandler's own
timer writes the stacks a little later and ends the process.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mt_core.distributed.environment import RankInfo, is_supervised_by_mt
from mt_core.distributed.exit_codes import EXIT_STALLED
from mt_core.distributed.heartbeat import Heartbeat, stacks_file, write_heartbeat
from mt_core.files import disk_errors

DIRECTORY, STALLED_MARK = "heartbeats", "stalled"
OTHER_RANKS_S = 3.0
"""A stalled rank leaves the others this long to write their stacks too."""
BACKSTOP_S = 3.0
"""faulthandler's timer comes so much after the thread's end."""


@contextmanager
def supervised(run_dir: Path, info: RankInfo, stall_timeout: float) -> Iterator[Heartbeat]:
    """Yield a heartbeat to update; `stall_timeout` seconds without an update end the process with EXIT_STALLED."""
    directory = run_dir / DIRECTORY
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        if info.rank == 0:
            _clear(directory, info.world_size)
        stacks = stacks_file(directory, info.rank).open("w", encoding="utf-8")
    if not faulthandler.is_enabled() and sys.__stderr__:
        faulthandler.enable(sys.__stderr__)  # a crash in C shows where
    watch = Watch(Heartbeat(), info, directory, stacks, stall_timeout)
    watch.heartbeat.on_timed = watch.timed
    write_heartbeat(directory, info, watch.heartbeat)
    watch.start()
    try:
        yield watch.heartbeat
        watch.heartbeat.update(watch.heartbeat.step, "done")
    finally:
        watch.stop()


def _clear(directory: Path, ranks: int) -> None:
    """Remove what an earlier, perhaps larger, run left. This run looks at STALLED_MARK only after all have joined."""
    (directory / STALLED_MARK).unlink(missing_ok=True)
    for file in directory.glob("rank-*"):
        number = file.name[len("rank-") :].partition(".")[0]
        if number.isdecimal() and int(number) >= ranks:
            file.unlink(missing_ok=True)


class Watch(threading.Thread):
    """The thread beside one rank's training."""

    def __init__(
        self, heartbeat: Heartbeat, info: RankInfo, directory: Path, stacks: IO[str], stall_timeout: float
    ) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.heartbeat, self.info, self.directory, self.stacks = heartbeat, info, directory, stacks
        self.stall_timeout = stall_timeout
        self.interval = min(max(1.0, info.world_size / 100), stall_timeout / 4)  # many ranks share one file system
        self.parent = os.getppid() if is_supervised_by_mt() else None
        self.stopping = threading.Event()
        self.shown = False
        self.written: float | None = None

    def run(self) -> None:
        """Look at the heartbeat about once a second."""
        while not self.stopping.wait(self.interval):
            if self.heartbeat.updated_at != self.written:
                self._progressed()
            if self.heartbeat.idle_seconds > self.stall_timeout:
                self._stalled()
            elif not self.shown and self.heartbeat.idle_seconds and (self.directory / STALLED_MARK).exists():
                self.show_stacks()
            if self.parent and os.getppid() != self.parent:
                self.parent = None
                print(f"mt{self.info.label}: the launcher is gone; saving and leaving", file=sys.stderr)
                os.kill(os.getpid(), 15)

    def stop(self) -> None:
        """End the thread, disarm the timer, and leave the last heartbeat behind."""
        self.stopping.set()
        self.join(timeout=5)
        faulthandler.cancel_dump_traceback_later()
        write_heartbeat(self.directory, self.info, self.heartbeat)
        self.stacks.close()
        if not self.shown:
            stacks_file(self.directory, self.info.rank).unlink(missing_ok=True)

    def _progressed(self) -> None:
        self.written = self.heartbeat.updated_at
        if self.heartbeat.idle_seconds:
            self.set_timer()
        else:
            faulthandler.cancel_dump_traceback_later()
        write_heartbeat(self.directory, self.info, self.heartbeat)

    def timed(self) -> None:
        """Arm the timer and write the file at once when a limit begins, so a rank that dies soon is past `start`."""
        self.set_timer()
        write_heartbeat(self.directory, self.info, self.heartbeat)

    def set_timer(self) -> None:
        """Let faulthandler end the process later than the thread would."""
        limit = self.stall_timeout + self.interval + OTHER_RANKS_S + BACKSTOP_S
        faulthandler.dump_traceback_later(limit, exit=True, file=self.stacks)

    def show_stacks(self) -> None:
        """Write all threads' stacks to the rank's file; to stderr too where no launcher of ours shows the file."""
        self.shown = True
        write_heartbeat(self.directory, self.info, self.heartbeat)
        faulthandler.dump_traceback(self.stacks, all_threads=True)
        if not is_supervised_by_mt() and sys.__stderr__:
            idle = f"{self.heartbeat.idle_seconds:.0f} s ago"
            where = f"step {self.heartbeat.step}, phase {self.heartbeat.phase!r}, {idle}"
            print(f"mt{self.info.label}: {where}; stacks:", file=sys.__stderr__, flush=True)
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)

    def _stalled(self) -> None:
        (self.directory / STALLED_MARK).touch()
        if not self.shown:
            self.show_stacks()
        print(f"mt{self.info.label}: {stall_message(self.heartbeat, self.stall_timeout)}", file=sys.stderr, flush=True)
        time.sleep(min(OTHER_RANKS_S, self.stall_timeout))
        if self.heartbeat.idle_seconds > self.stall_timeout and not self.stopping.is_set():
            os._exit(EXIT_STALLED)


def stall_message(heartbeat: Heartbeat, stall_timeout: float) -> str:
    """What a rank says before it ends."""
    where = f"step {heartbeat.step}, phase {heartbeat.phase!r}"
    return f"no progress for {stall_timeout:g} s (runtime.stall_timeout) in {where}: it, or a rank it waits for, hangs"
