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

from mt_core.distributed.environment import Place, supervised_by_mt
from mt_core.distributed.exit_codes import EXIT_STALLED
from mt_core.distributed.heartbeat import Heart, stacks_file, write_heartbeat
from mt_core.files import disk_errors

DIRECTORY, MARK = "heartbeats", "stalled"
OTHERS_S = 3.0
"""A stalled rank leaves the others this long to write their stacks too."""
BACKSTOP_S = 3.0
"""faulthandler's timer comes so much after the thread's end."""


@contextmanager
def supervised(run_dir: Path, place: Place, stall_timeout: float) -> Iterator[Heart]:
    """A heart to beat while training; `stall_timeout` seconds without a beat end the process with EXIT_STALLED."""
    directory = run_dir / DIRECTORY
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        if place.rank == 0:
            _clear(directory, place.ranks)
        stacks = stacks_file(directory, place.rank).open("w", encoding="utf-8")
    if not faulthandler.is_enabled() and sys.__stderr__:
        faulthandler.enable(sys.__stderr__)  # a crash in C shows where
    watch = Watch(Heart(), place, directory, stacks, stall_timeout)
    watch.heart.on_timed = watch.timed
    write_heartbeat(directory, place, watch.heart)
    watch.start()
    try:
        yield watch.heart
        watch.heart.beat(watch.heart.step, "done")
    finally:
        watch.stop()


def _clear(directory: Path, ranks: int) -> None:
    """Remove what an earlier, perhaps larger, run left. Ranks of this one look at MARK only after all have joined."""
    (directory / MARK).unlink(missing_ok=True)
    for file in directory.glob("rank-*"):
        number = file.name[len("rank-") :].partition(".")[0]
        if number.isdecimal() and int(number) >= ranks:
            file.unlink(missing_ok=True)


class Watch(threading.Thread):
    """The thread beside one rank's training."""

    def __init__(self, heart: Heart, place: Place, directory: Path, stacks: IO[str], stall_timeout: float) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.heart, self.place, self.directory, self.stacks = heart, place, directory, stacks
        self.stall_timeout = stall_timeout
        self.interval = min(max(1.0, place.ranks / 100), stall_timeout / 4)  # many ranks share one file system
        self.parent = os.getppid() if supervised_by_mt() else None
        self.ended = threading.Event()
        self.shown = False
        self.written: float | None = None

    def run(self) -> None:
        """Look at the heart about once a second."""
        while not self.ended.wait(self.interval):
            if self.heart.at != self.written:
                self._progressed()
            if self.heart.still > self.stall_timeout:
                self._stalled()
            elif not self.shown and self.heart.still and (self.directory / MARK).exists():
                self.show_stacks()
            if self.parent and os.getppid() != self.parent:
                self.parent = None
                print(f"mt{self.place.label}: the launcher is gone; saving and leaving", file=sys.stderr)
                os.kill(os.getpid(), 15)

    def stop(self) -> None:
        """End the thread, disarm the timer, and leave the last heartbeat behind."""
        self.ended.set()
        self.join(timeout=5)
        faulthandler.cancel_dump_traceback_later()
        write_heartbeat(self.directory, self.place, self.heart)
        self.stacks.close()
        if not self.shown:
            stacks_file(self.directory, self.place.rank).unlink(missing_ok=True)

    def _progressed(self) -> None:
        self.written = self.heart.at
        if self.heart.still:
            self.set_timer()
        else:
            faulthandler.cancel_dump_traceback_later()
        write_heartbeat(self.directory, self.place, self.heart)

    def timed(self) -> None:
        """What a first beat with a limit does at once: should the rank die within the second, it is not `start`."""
        self.set_timer()
        write_heartbeat(self.directory, self.place, self.heart)

    def set_timer(self) -> None:
        """Let faulthandler end the process later than the thread would."""
        limit = self.stall_timeout + self.interval + OTHERS_S + BACKSTOP_S
        faulthandler.dump_traceback_later(limit, exit=True, file=self.stacks)

    def show_stacks(self) -> None:
        """Write all threads' stacks to the rank's file; to stderr too where no launcher of ours shows the file."""
        self.shown = True
        write_heartbeat(self.directory, self.place, self.heart)
        faulthandler.dump_traceback(self.stacks, all_threads=True)
        if not supervised_by_mt() and sys.__stderr__:
            where = f"step {self.heart.step}, phase {self.heart.phase!r}, {self.heart.still:.0f} s ago"
            print(f"mt{self.place.label}: {where}; stacks:", file=sys.__stderr__, flush=True)
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)

    def _stalled(self) -> None:
        (self.directory / MARK).touch()
        if not self.shown:
            self.show_stacks()
        print(f"mt{self.place.label}: {stall_message(self.heart, self.stall_timeout)}", file=sys.stderr, flush=True)
        time.sleep(min(OTHERS_S, self.stall_timeout))
        if self.heart.still > self.stall_timeout and not self.ended.is_set():
            os._exit(EXIT_STALLED)


def stall_message(heart: Heart, stall_timeout: float) -> str:
    """What a rank says before it ends."""
    where = f"step {heart.step}, phase {heart.phase!r}"
    return f"no progress for {stall_timeout:g} s (runtime.stall_timeout) in {where}: it, or a rank it waits for, hangs"
