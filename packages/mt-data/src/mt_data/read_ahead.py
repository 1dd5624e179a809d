"""A thread that draws from an iterable before its items are asked for."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

STOP_CHECK_S = 0.1
"""How long the thread may live on after its iterator is gone."""


def read_ahead(items: Iterable[Item], depth: int) -> Iterator[Item]:
    """The items in their order, up to `depth` of them drawn ahead; 0 draws each when it is asked for.

    What the iterable raises is raised here, after the items before it.
    """
    if depth == 0:
        yield from items
        return
    ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()
    thread = threading.Thread(target=_draw, args=(items, ready, stopped), name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # pyright: ignore[reportReturnType] - there is an item where there is no error
    finally:
        stopped.set()
        thread.join()  # an interpreter that ends while the thread is inside torch aborts


def _draw(items: Iterable[Item], ready: "queue.Queue", stopped: threading.Event) -> None:
    try:
        for item in items:
            _put(ready, (item, None), stopped)
            if stopped.is_set():
                return
        _put(ready, (None, StopIteration()), stopped)
    except BaseException as error:  # of whatever kind: it is raised where the items are wanted
        _put(ready, (None, error), stopped)


def _put(ready: "queue.Queue", item: object, stopped: threading.Event) -> None:
    while not stopped.is_set():
        try:
            ready.put(item, timeout=STOP_CHECK_S)
        except queue.Full:
            continue
        return
