"""SIGTERM as a request to save and leave, honoured between two steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_TERMINATED = 128 + signal.SIGTERM
"""Exit code of a run that SIGTERM ended, after its checkpoint was committed."""


class StopRequest:
    """Whether SIGTERM has come."""

    asked = False


@contextmanager
def on_sigterm() -> Iterator[StopRequest]:
    """While the block runs, SIGTERM sets the flag instead of killing the process."""
    request = StopRequest()

    def handle(_number: int, _frame: FrameType | None) -> None:
        request.asked = True

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
