"""Waiting for another rank's files: no collective, ever fewer looks, and a bound on the time without progress."""

import time
from collections.abc import Callable
from typing import TypeVar

from mt_core.errors import MtError

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.01, 0.25

Found = TypeVar("Found")


def poll_until(
    ready: Callable[[], Found | None],
    *,
    timeout_s: float,
    late: Callable[[], MtError],
    progress: Callable[[], object] = lambda: None,
) -> Found:
    """The first result of `ready` that is not None; raises `late()` once `progress()` has not changed for so long."""
    pause, seen, since = FIRST_PAUSE_S, progress(), time.monotonic()
    while (found := ready()) is None:
        if (now := progress()) != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > timeout_s:
            raise late()
        time.sleep(pause)
        pause = min(pause * 1.5, LONGEST_PAUSE_S)
    return found
