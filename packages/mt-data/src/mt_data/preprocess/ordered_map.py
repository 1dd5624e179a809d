"""A map over worker processes that keeps the order and holds only a few items in memory."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from mt_core.errors import MtError

Item = TypeVar("Item")
Result = TypeVar("Result")

IN_FLIGHT_PER_WORKER = 3


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int
) -> Generator[Result, None, None]:
    """`function(item)` of every item, in order; in this process if there is one worker.

    A worker that dies is an `MtError`; one that is stopped with this process says nothing of its own.
    """
    if workers == 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")  # the library's threads do not survive a fork
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)
    pending = deque()
    try:
        for item in items:
            with _interrupts_wait():
                pending.append(pool.submit(function, item))
            if len(pending) > IN_FLIGHT_PER_WORKER * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as err:
        raise MtError(
            "a worker process", "was killed", "the machine may be out of memory: run again with fewer --workers"
        ) from err
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Hold Ctrl-C back while a worker may be started: it inherits that, and only this process hears the key."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
