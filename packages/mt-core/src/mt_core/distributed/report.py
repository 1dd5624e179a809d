"""What the launcher prints when a run fails: each rank, where it was and how it ended, then the stacks of a stall."""

import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mt_core.distributed.exit_codes import EXIT_DEFECT, EXIT_LOST_RANK, EXIT_MISSING_RANKS, EXIT_STALLED, shell_code
from mt_core.distributed.heartbeat import read_heartbeat, stacks_file
from mt_core.errors import EXIT_USER_ERROR

MEANINGS = {
    0: "done",
    EXIT_DEFECT: "failed with a traceback",
    EXIT_USER_ERROR: "refused its input",
    EXIT_MISSING_RANKS: "not all ranks came",
    EXIT_STALLED: "made no progress",
    EXIT_LOST_RANK: "lost another rank",
}
COLUMNS = ("rank", "step", "phase", "since", "host", "pid", "end")


@dataclass(frozen=True, slots=True)
class RankExit:
    """How a rank's process ended; `status` is negative for a signal."""

    rank: int
    pid: int
    status: int
    stopped: bool = False
    """Whether it ended as the launcher told it to, because another rank had failed."""


def report(directory: Path, ended: Sequence[RankExit]) -> str:
    """A table of all ranks by their heartbeats under `directory`, and the stacks that they left."""
    now = time.time()
    ended = sorted(ended, key=lambda end: end.rank)
    rows = [COLUMNS, *(_row(directory, end, now) for end in ended)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(["mt: the run failed; where each rank was:", *lines, *_stacks(directory, ended)])


def _row(directory: Path, end: RankExit, now: float) -> tuple[str, ...]:
    heartbeat = read_heartbeat(directory, end.rank, end.pid)
    if heartbeat is None:
        return (str(end.rank), "-", "-", "-", "-", str(end.pid), describe(end))
    since = f"{max(0.0, now - heartbeat['time']):.1f} s"
    step, phase, host = (str(heartbeat[key]) for key in ("step", "phase", "host"))
    return (str(end.rank), step, phase, since, host, str(end.pid), describe(end))


def describe(end: RankExit) -> str:
    """The end of a rank in words."""
    if end.stopped:
        return f"stopped by the launcher ({signal.Signals(shell_code(end.status) - 128).name})"
    if end.status < 0:
        return f"killed by {signal.Signals(-end.status).name}"
    meaning = MEANINGS.get(end.status)
    return f"exit {end.status}" + (f": {meaning}" if meaning else "")


def _stacks(directory: Path, ended: Sequence[RankExit]) -> Iterator[str]:
    for end in ended:
        file = stacks_file(directory, end.rank)
        if read_heartbeat(directory, end.rank, end.pid) and file.exists() and (text := file.read_text().strip()):
            yield f"\nmt: stacks of rank {end.rank} ({file}):\n{text}"
