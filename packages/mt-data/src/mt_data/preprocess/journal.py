"""The journal of a job: what it is, and after every shard of work how far it came, each line on the disk at once.

The first line is the job's key: everything that the output depends on. A journal with another key, from another
version, or whose files are shorter than it says is of no use and is discarded with a note that says why.
"""

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from mt_core.errors import MtError
from mt_core.files import TEMPORARY, disk_errors
from mt_data.preprocess.chunking import InputPosition


@dataclass(frozen=True, slots=True)
class JournalMark:
    """How far a job came."""

    position: InputPosition = field(default_factory=InputPosition)
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of every unfinished file."""
    report: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    """All that is left is to give the files their names."""


class Journal:
    """The folder of a job's unfinished files, and the journal in it. One process at a time locks it."""

    def __init__(self, output_prefix: str) -> None:
        self.folder = Path(f"{output_prefix}.preprocess{TEMPORARY}")
        self._path = self.folder / "journal.jsonl"
        self._file: IO[str] | None = None
        self.marked = False
        """Whether there is work in the folder that another run can go on with."""

    def open(self, key: Mapping[str, Any]) -> JournalMark | None:
        """Lock the folder; returns the last mark if its journal belongs to the same job, else None."""
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a+", encoding="utf-8")
        self._lock(self._file)
        self._file.seek(0)
        plain = json.loads(json.dumps(key))
        recorded_key, mark = _parse_journal(self._file.read())
        if recorded_key == plain and mark:
            self.marked = True
            return mark
        if recorded_key is not None and mark:
            changed = [name for name in {**plain, **recorded_key} if recorded_key.get(name) != plain.get(name)]
            self.discard_note(f"of another job: {', '.join(changed)}" if changed else "unreadable")
        return None

    def begin(self, key: Mapping[str, Any]) -> None:
        """Start over: remove whatever is in the folder and write the first line."""
        assert self._file
        self.marked = False
        for path in self.folder.iterdir():
            if path != self._path:
                path.unlink()
        with disk_errors(self._path):
            self._file.truncate(0)
        self._write(key)

    def discard_note(self, why: str) -> None:
        """Say that an earlier run is not continued."""
        print(f"{self.folder}: an earlier run is not continued, as it is {why}", file=sys.stderr)

    def mark(self, mark: JournalMark) -> None:
        """Record how far the job came; returns when that is on the disk."""
        self._write(asdict(mark))
        self.marked = True

    def remove(self) -> None:
        """Remove the folder and the journal, the journal first."""
        self.close()
        self._path.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def remove_empty(self) -> None:
        """Remove the folder if there is nothing in it: it was made, and the run stopped before it had locked it."""
        with suppress(OSError):
            self.folder.rmdir()

    @property
    def is_locked(self) -> bool:
        """Whether this process has locked the folder."""
        return self._file is not None

    def close(self) -> None:
        """Unlock the folder."""
        if self._file:
            self._file.close()
            self._file = None

    def _lock(self, file: IO[str]) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise MtError(
                str(self.folder), "is in use by another run", "wait for it, or choose another --output-prefix"
            ) from None
        except OSError:
            return  # a file system without locks

    def _write(self, value: Mapping[str, Any]) -> None:
        assert self._file
        with disk_errors(self._path):
            self._file.write(json.dumps(value) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())


def _parse_journal(text: str) -> tuple[dict[str, Any] | None, JournalMark | None]:
    """Key and last mark; a line that was cut off by a crash is not there."""
    lines = text.split("\n")[:-1]
    try:
        key = json.loads(lines[0]) if lines else None
        if len(lines) < 2:
            return key, None
        last = json.loads(lines[-1])
        return key, JournalMark(**{**last, "position": InputPosition(**last["position"])})
    except (ValueError, TypeError, KeyError):
        return None, None
