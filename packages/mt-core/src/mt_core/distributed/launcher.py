"""`mt train --nproc N`: N ranks as processes of this machine, watched until all have ended. Torch-free.

torchrun starts ranks as well, and does over several machines. On one, this knows every rank's status, passes
SIGTERM on without a limit (torchrun kills 30 s later, amid the save), and is there without loading torch.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from mt_core.distributed.environment import LAUNCHER, LISTENER
from mt_core.distributed.exit_codes import EXIT_LOST_RANK, FINAL, shell_code
from mt_core.distributed.report import RankExit, report
from mt_core.distributed.watchdog import DIRECTORY

POLL_S = 0.05
NOTICE_S, GRACE_S = 1.0, 6.0
"""After a rank has failed, the others get so long to notice and say so, then SIGTERM; and so long until SIGKILL."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(slots=True)
class ReceivedSignals:
    """Signals that the launcher received."""

    numbers: list[int] = field(default_factory=list)


def launch(arguments: Sequence[str], processes: int, *, run_dir: Path, max_restarts: int = 0) -> int:
    """Run `python ARGUMENTS` as ranks until they end well, or have failed `max_restarts` times more; the exit code."""
    with _signals() as received:
        restarts_left = max_restarts
        while True:
            ended = run_ranks(arguments, processes, received)
            code = exit_code(ended, received)
            if code == 0 or received.numbers:
                return code
            print(report(run_dir / DIRECTORY, ended), file=sys.stderr, flush=True)
            if code in FINAL or not restarts_left:
                return code
            restarts_left -= 1
            print(f"mt: starting all ranks again; restarts left: {restarts_left}", file=sys.stderr, flush=True)


def run_ranks(arguments: Sequence[str], processes: int, received: ReceivedSignals) -> list[RankExit]:
    """Start ranks and wait for all; how they ended, in that order.

    Once one fails, the others are told to stop, and killed after GRACE_S.
    """
    running = dict(enumerate(start_ranks(arguments, processes)))
    ended: list[RankExit] = []
    failed_at: float | None = None
    passed_on = 0
    sent: set[int] = set()
    try:
        while running:
            for rank, process in list(running.items()):
                if (status := process.poll()) is not None:
                    del running[rank]
                    ended.append(RankExit(rank, process.pid, status, stopped=shell_code(status) - 128 in sent))
            if failed_at is None and any(_failed(end.status, received) for end in ended):
                failed_at = time.monotonic()
            for number in received.numbers[passed_on:]:
                passed_on += 1
                _send(running.values(), number if passed_on == 1 else signal.SIGKILL)
            for number, seconds in ((signal.SIGTERM, NOTICE_S), (signal.SIGKILL, GRACE_S)):
                if failed_at is not None and number not in sent and time.monotonic() > failed_at + seconds:
                    _send(running.values(), number)
                    sent.add(number)
            time.sleep(POLL_S)
    finally:
        _send(running.values(), signal.SIGKILL)
    return ended


def start_ranks(arguments: Sequence[str], processes: int) -> Iterator[subprocess.Popen[bytes]]:
    """The ranks, with torch's variables; rank 0 inherits the socket that the others will connect to."""
    with socket.create_server(("127.0.0.1", 0), backlog=max(processes, 128)) as listener:
        for rank in range(processes):
            environment = os.environ | {
                "RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(listener.getsockname()[1]),
                LAUNCHER: str(os.getpid()),
            }
            inherited = (listener.fileno(),) if rank == 0 else ()
            if inherited:
                environment[LISTENER] = str(inherited[0])
            yield subprocess.Popen([sys.executable, *arguments], env=environment, pass_fds=inherited)


def exit_code(ended: Sequence[RankExit], received: ReceivedSignals) -> int:
    """0 if all ended well; else that of the cause: the rank that failed first, and not for the loss of another."""
    failed = [end for end in ended if end.status != 0]
    if not failed:
        return 0
    if received.numbers and not any(_failed(end.status, received) for end in failed):
        return 128 + received.numbers[0]
    cause = min(failed, key=lambda end: (end.stopped, end.status == EXIT_LOST_RANK))  # the first such that ended
    return shell_code(cause.status)


def _failed(status: int, received: ReceivedSignals) -> bool:
    wanted = {128 + number for number in received.numbers} | {-number for number in received.numbers}
    return status != 0 and status not in wanted


def _send(processes: Iterable[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        process.send_signal(number)


@contextmanager
def _signals() -> Iterator[ReceivedSignals]:
    """Note SIGTERM, Ctrl-C and SIGHUP instead of ending from them."""
    received = ReceivedSignals()

    def handle(number: int, _frame: FrameType | None) -> None:
        received.numbers.append(number)

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
