"""SIGTERM and Ctrl-C as requests to save and leave, honoured between two steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class GracefulStop:
    """Which signal asked the run to stop, if one has."""

    signal: int | None = None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells count; SIGTERM's if it came to another rank."""
        return 128 + (self.signal or signal.SIGTERM)


@contextmanager
def catch_stop_signals(*, insistent: bool) -> Iterator[GracefulStop]:
    """While the block runs, SIGTERM and Ctrl-C are noted; if `insistent`, a second Ctrl-C interrupts at once.

    Ranks are not insistent: a launcher passes on the Ctrl-C that the terminal has sent them already.
    """
    request = GracefulStop()

    def handle(number: int, _frame: FrameType | None) -> None:
        request.signal = number
        if insistent:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
