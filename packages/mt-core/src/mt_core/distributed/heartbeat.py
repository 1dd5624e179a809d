"""How far a rank has come: RUN/heartbeats/rank-00003.json, written by a thread; `update` only sets attributes."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mt_core.distributed.environment import RankInfo

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
class Heartbeat:
    """The progress of this process's training. `update` costs well under a microsecond."""

    step: int = 0
    phase: Phase = "start"
    updated_at: float = field(default_factory=time.monotonic)
    """Monotonic seconds of the last update."""
    on_timed: Callable[[], None] | None = None
    """Called when a phase with a limit follows one without."""

    def update(self, step: int, phase: Phase) -> None:
        """Record that `step` (the one in progress, from 1) has reached `phase`."""
        begins = self.phase in UNTIMED and phase not in UNTIMED
        self.step, self.phase, self.updated_at = step, phase, time.monotonic()
        if begins and self.on_timed:
            self.on_timed()

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last update; 0 in a phase without a limit."""
        return 0.0 if self.phase in UNTIMED else time.monotonic() - self.updated_at


def heartbeat_file(directory: Path, rank: int) -> Path:
    """File of a rank's heartbeat."""
    return directory / f"rank-{rank:05d}.json"


def stacks_file(directory: Path, rank: int) -> Path:
    """File of the stacks of a rank that stalled."""
    return directory / f"rank-{rank:05d}.stacks.txt"


def write_heartbeat(directory: Path, info: RankInfo, heartbeat: Heartbeat) -> None:
    """Replace the rank's file. Not flushed to disk, and a file system in trouble is no reason to stop training."""
    file = heartbeat_file(directory, info.rank)
    temporary = file.with_suffix(f".{threading.get_ident()}.tmp")
    record = {
        "rank": info.rank,
        "ranks": info.world_size,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "step": heartbeat.step,
        "phase": heartbeat.phase,
        "time": time.time() - (time.monotonic() - heartbeat.updated_at),
    }
    try:
        temporary.write_text(json.dumps(record) + "\n")
        temporary.replace(file)
    except OSError:
        return


def read_heartbeat(directory: Path, rank: int, pid: int) -> Mapping[str, Any] | None:
    """The heartbeat of the process `pid` as rank `rank`; None if it wrote none, or another process did."""
    try:
        record = json.loads(heartbeat_file(directory, rank).read_text())
    except (OSError, ValueError):
        return None
    return record if record["pid"] == pid else None
