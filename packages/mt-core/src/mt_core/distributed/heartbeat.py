"""Where a rank is: RUN/heartbeats/rank-00003.json, kept up to date by a thread; a beat itself only sets attributes."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mt_core.distributed.environment import Place

Phase = Literal[
    "start",
    "join",
    "data",
    "forward",
    "backward",
    "forward and backward",
    "reduce",
    "optimizer",
    "evaluate",
    "save",
    "saved",
    "done",
]
UNTIMED = ("start", "join", "done")
"""Phases in which no progress is no stall: building an index takes its time, and joining has its own limit."""


@dataclass(slots=True)
class Heart:
    """The last sign of life of this process's training. `beat` costs well under a microsecond."""

    step: int = 0
    phase: Phase = "start"
    at: float = field(default_factory=time.monotonic)
    """Monotonic seconds of the last beat."""
    on_timed: Callable[[], None] | None = None
    """Called when a phase with a limit follows one without."""

    def beat(self, step: int, phase: Phase) -> None:
        """Note that `step` (the one in progress, from 1) has come to `phase`."""
        begins = self.phase in UNTIMED and phase not in UNTIMED
        self.step, self.phase, self.at = step, phase, time.monotonic()
        if begins and self.on_timed:
            self.on_timed()

    @property
    def still(self) -> float:
        """Seconds since the last beat, 0 in a phase that has no limit."""
        return 0.0 if self.phase in UNTIMED else time.monotonic() - self.at


def heartbeat_file(directory: Path, rank: int) -> Path:
    """The heartbeat of a rank."""
    return directory / f"rank-{rank:05d}.json"


def stacks_file(directory: Path, rank: int) -> Path:
    """The stacks of a rank that stalled."""
    return directory / f"rank-{rank:05d}.stacks.txt"


def write_heartbeat(directory: Path, place: Place, heart: Heart) -> None:
    """Replace the rank's file. Not flushed to disk, and a file system in trouble is no reason to stop training."""
    file = heartbeat_file(directory, place.rank)
    temporary = file.with_suffix(f".{threading.get_ident()}.tmp")
    record = {
        "rank": place.rank,
        "ranks": place.ranks,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "step": heart.step,
        "phase": heart.phase,
        "time": time.time() - (time.monotonic() - heart.at),
    }
    try:
        temporary.write_text(json.dumps(record) + "\n")
        temporary.replace(file)
    except OSError:
        return


def read_heartbeat(directory: Path, rank: int, pid: int) -> Mapping[str, Any] | None:
    """The heartbeat of the process `pid` as rank `rank`; None if it wrote none, or another process did."""
    try:
        found = json.loads(heartbeat_file(directory, rank).read_text())
    except (OSError, ValueError):
        return None
    return found if found["pid"] == pid else None
