"""Run a function on several CPU ranks over gloo: a forkserver with torch preloaded starts them in tenths of a second.

A rank that raises, dies or hangs ends the run: at once, or after the time-out with the stacks of all ranks.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mt_core.distributed.mesh import Axis
from mt_core.errors import MtError

TIMEOUT_S = 120.0
"""A run that has not ended by then has failed."""
OTHER_RANKS_S = 2.0
"""Seconds that the other ranks get to answer once one has failed."""
STACKS_S = 1.0
"""Time to write stacks in."""

PRELOADED = [
    "torch",
    "torch.distributed",
    "torch.distributed.fsdp",
    "torch._dynamo",
    "mt_core.verification.measure",
    "mt_models.models.gpt",
]
"""What the forkserver imports once, those of them that are installed."""


class RanksFailed(Exception):
    """What went wrong on the ranks: tracebacks, exit codes, or the stacks of ranks that hang."""


@dataclass(frozen=True, slots=True)
class Value:
    """What a rank returned, as bytes: a tensor's memory would end with its process."""

    pickled: bytes


@dataclass(frozen=True, slots=True)
class Refusal:
    """A mistake of the user's that a rank detected."""

    error: MtError


@dataclass(frozen=True, slots=True)
class Failure:
    """The traceback of a rank that raised."""

    text: str


@dataclass(frozen=True, slots=True)
class Death:
    """The exit code of a rank that ended without an answer; below 0, the signal that killed it."""

    code: int


Answer = Value | Refusal | Failure | Death


@dataclass(frozen=True, slots=True)
class Rank:
    """A rank's process and the end of the pipe on which it answers."""

    process: Any
    answers: connection.Connection

    def answer(self) -> Answer | None:
        """The rank's answer, or how it ended; None while it works."""
        try:
            if self.answers.poll():
                return self.answers.recv()
        except (EOFError, OSError):
            self.process.join(STACKS_S)
        return None if self.process.is_alive() else Death(self.process.exitcode)


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
    """Results of `function(axis, *arguments)` on each of `size` fresh processes, in rank order.

    An `MtError` of a rank is raised as it is, or one that says which rank was killed; `RanksFailed` has the rest.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [_start(context, (rank, size, Path(folder), function, arguments)) for rank in range(size)]
        finished = False
        try:
            answers = _collect(ranks, timeout_s)
            _refuse_failures(answers)
            if len(answers) < size:
                raise RanksFailed(_describe_hanging(ranks, answers, Path(folder), timeout_s))
            finished = True
        finally:
            for rank in ranks:
                rank.process.join(timeout=10 if finished else 0)
                rank.process.kill()
                rank.answers.close()
    return [pickle.loads(value.pickled) for _, value in sorted(answers.items()) if isinstance(value, Value)]


def _start(context: Any, work: tuple[Any, ...]) -> Rank:
    parent_end, child_end = context.Pipe(duplex=False)
    process = context.Process(target=_rank, args=(child_end, *work))
    process.start()
    child_end.close()  # so that its end is seen
    return Rank(process, parent_end)


def _collect(ranks: Sequence[Rank], timeout_s: float) -> dict[int, Answer]:
    """Answers as they come, until all are there, the time is over, or a failure leaves the others no more of it."""
    answers: dict[int, Answer] = {}
    limit = time.monotonic() + timeout_s
    while waiting := {number: rank for number, rank in enumerate(ranks) if number not in answers}:
        left = limit - time.monotonic()
        events = [event for rank in waiting.values() for event in (rank.answers, rank.process.sentinel)]
        if left <= 0 or not connection.wait(events, left):
            break
        arrived = {number: rank.answer() for number, rank in waiting.items()}
        answers |= {number: answer for number, answer in arrived.items() if answer is not None}
        if not all(isinstance(answer, Value) for answer in answers.values()):
            limit = min(limit, time.monotonic() + OTHER_RANKS_S)
    return answers


def _refuse_failures(answers: Mapping[int, Answer]) -> None:
    """Raise the cause: other ranks' broken connections follow from a death, or from a mistake on one rank."""
    for number, answer in answers.items():
        if isinstance(answer, Death) and answer.code == -signal.SIGKILL:
            raise MtError(f"rank {number}", "was killed by SIGKILL", "if memory ran out, use fewer ranks")
    for answer in answers.values():
        if isinstance(answer, Refusal):
            raise answer.error
    deaths = [
        f"rank {n} {_describe_exit(a.code)} without an answer" for n, a in answers.items() if isinstance(a, Death)
    ]
    failures = [f"rank {n} raised\n{a.text}" for n, a in answers.items() if isinstance(a, Failure)]
    if deaths or failures:
        raise RanksFailed("\n".join([*deaths, *failures]))


def _describe_exit(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _describe_hanging(ranks: Sequence[Rank], answers: Mapping[int, Answer], folder: Path, timeout_s: float) -> str:
    """Which ranks have not answered, and where each of them is."""
    missing = [number for number in range(len(ranks)) if number not in answers]
    for number in missing:
        if _stacks_file(folder, number).exists():
            os.kill(ranks[number].process.pid, signal.SIGUSR1)
    time.sleep(STACKS_S)
    stacks = {
        n: _stacks_file(folder, n).read_text() if _stacks_file(folder, n).exists() else "not started\n" for n in missing
    }
    who = ", ".join(map(str, missing))
    return f"no answer of rank {who} in {timeout_s:g} s\n" + "\n".join(
        f"rank {n}:\n{text}" for n, text in stacks.items()
    )


def _stacks_file(folder: Path, rank: int) -> Path:
    return folder / f"stacks-{rank}"


def _rank(
    answers: connection.Connection,
    rank: int,
    size: int,
    folder: Path,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent too, which ends its ranks
    torch.set_num_threads(1)
    with _stacks_file(folder, rank).with_suffix(".new").open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
        Path(stacks.name).rename(_stacks_file(folder, rank))
        answers.send(_answer(rank, size, folder, function, arguments))
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        faulthandler.unregister(signal.SIGUSR1)


def _answer(rank: int, size: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Answer:
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=size)
        return Value(pickle.dumps(function(Axis("data", rank, size, dist.group.WORLD), *arguments)))
    except MtError as error:
        return Refusal(error)
    except Exception:
        return Failure(traceback.format_exc())
