"""A step that someone reads is not pruned: readers share a lock on its COMMITTED mark, pruning wants it alone.

The lock is the kernel's (flock): it ends with the process that holds it, however that ends.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mt_core.errors import MtError


@contextmanager
def reading(mark: Path) -> Iterator[None]:
    """While the block runs, the step with this mark is not pruned; it must be there."""
    gone = MtError(str(mark.parent), "is no longer there: it was pruned", "use a later step")
    try:
        file = mark.open("rb")
    except FileNotFoundError as err:
        raise gone from err
    with file:
        with suppress(OSError):  # a file system without locks: read all the same
            fcntl.flock(file, fcntl.LOCK_SH)
        if not mark.exists():  # pruned between the two lines above
            raise gone
        yield


@contextmanager
def alone(mark: Path) -> Iterator[bool]:
    """Whether no one reads the step with this mark; no one begins to while the block runs."""
    with mark.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks
            pass
        yield True
