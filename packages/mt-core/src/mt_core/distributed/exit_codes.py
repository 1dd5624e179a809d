"""Exit codes of `mt train`, and a rank's failures that have their own; docs/reference/errors.md lists them."""

import signal

from mt_core.errors import EXIT_USER_ERROR

EXIT_DEFECT = 1
EXIT_MISSING_RANKS = 3
EXIT_STALLED = 4
EXIT_LOST_RANK = 5

FINAL = (EXIT_USER_ERROR, 128 + signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGHUP)
"""A rank that ends so says that trying again would not help, or is not wanted."""


class RankFailure(Exception):
    """Why this rank cannot go on although nothing is wrong with the input; `code` is its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def shell_code(status: int) -> int:
    """A process's status as a shell counts it: 128 + the signal's number where a signal ended it."""
    return 128 - status if status < 0 else status
