"""A map over worker processes that keeps the order, holds only a few items in memory and survives killed workers."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import FrameType
from typing import Generic, TypeVar

from mt_core.errors import MtError

Item = TypeVar("Item")
Result = TypeVar("Result")

IN_FLIGHT_PER_WORKER = 3
DEATHS_ALLOWED = 3
"""In a row, without a result between them; then it is no accident."""


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int
) -> Generator[Result, None, None]:
    """`function(item)` of every item, in order; in this process if there is one worker.

    When a worker dies, those items that have no result yet are done again by new workers; when that happens
    `DEATHS_ALLOWED` times without a result it is an `MtError`. A worker stopped with this process says nothing.
    """
    if workers == 1:
        yield from map(function, items)
        return
    pool = _Pool(function, workers)
    try:
        for item in items:
            pool.submit(item)
            if len(pool.pending) > IN_FLIGHT_PER_WORKER * workers:
                yield pool.next_result()
        while pool.pending:
            yield pool.next_result()
    finally:
        pool.shutdown()


class _Pool(Generic[Item, Result]):
    """Worker processes, and the items that they have or had."""

    def __init__(self, function: Callable[[Item], Result], workers: int) -> None:
        self._function, self._workers, self._deaths = function, workers, 0
        self.pending: deque[tuple[Item, Future[Result]]] = deque()
        self._executor = self._start()

    def _start(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")  # the library's threads do not survive a fork
        return ProcessPoolExecutor(self._workers, mp_context=context, initializer=_initialize_worker)

    def submit(self, item: Item) -> None:
        try:
            self.pending.append((item, self._submit(item)))
        except BrokenProcessPool as err:
            self._restart(err)
            self.pending.append((item, self._submit(item)))

    def _submit(self, item: Item) -> "Future[Result]":
        with _delay_interrupts():
            return self._executor.submit(self._function, item)

    def next_result(self) -> Result:
        """The result of the oldest item."""
        while True:
            try:
                result = self.pending[0][1].result()
            except BrokenProcessPool as err:
                self._restart(err)
                continue
            self.pending.popleft()
            self._deaths = 0
            return result

    def _restart(self, err: BrokenProcessPool) -> None:
        self._deaths += 1
        if self._deaths == DEATHS_ALLOWED:
            raise MtError(
                "a worker process",
                f"was killed, {DEATHS_ALLOWED} times in a row",
                "the machine may be out of memory: run again with fewer --workers",
            ) from err
        print("a worker process was killed; its part is done again", file=sys.stderr, flush=True)
        self._executor.shutdown(cancel_futures=True)
        self._executor = self._start()
        self.pending = deque(
            (item, future if _has_result(future) else self._submit(item)) for item, future in self.pending
        )

    def shutdown(self) -> None:
        self._executor.shutdown(cancel_futures=True)


def _has_result(future: "Future[Result]") -> bool:
    return future.done() and not future.cancelled() and not isinstance(future.exception(), BrokenProcessPool)


@contextmanager
def _delay_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back while a worker may be started, so that none is left half started.

    The mask is for the workers: they inherit it, and only this process hears the key. Here another thread, such as
    numpy's, may still take the signal, whose handler then runs in this one: so that waits too.
    """
    heard: list[tuple[int, FrameType | None]] = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    handler = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if handler is not None:
        signal.signal(signal.SIGINT, lambda *call: heard.append(call))
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if heard and callable(handler):
        handler(*heard[0])


def _initialize_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
