"""Scores by the hash of their text, so that no text is scored twice: in memory, and in a file if one is named.

The file is JSON lines that only grow: `text`, a hash; `by`, the hash of the scorer's identity; and `scores`, or
`unscored`, why there are none. A line that a killed process has left half is cut off.
"""

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from mt_core.contracts import ToxicityScorer
from mt_core.errors import MtError
from mt_core.files import disk_errors
from mt_data.text_io.json_documents import BadLine, parse_object

Scores = Mapping[str, float] | str
"""Scores by their attribute, or why there are none."""
BLANK = "is blank"
"""Why a text without a letter has no scores; no scorer is asked."""


class CachedScorer:
    """A scorer that remembers."""

    def __init__(self, scorer: ToxicityScorer, file: IO[bytes] | None = None) -> None:
        self.scorer, self._file = scorer, file
        self._by = hash_text(scorer.identity)
        self._known = dict[str, Scores]()
        if file is not None:
            self._known = _read_known(file, self._by)

    def score(self, texts: Sequence[str]) -> list[Scores]:
        """What the scorer says of each text; those that it has not seen are given to it, each once."""
        hashes = {text: hash_text(text) for text in texts if text.strip()}
        missing = [text for text, name in hashes.items() if name not in self._known]
        if missing:
            new = {hashes[text]: scores for text, scores in zip(missing, self.scorer.score(missing), strict=True)}
            self._known |= new
            self._append(new)
        return [self._known[hashes[text]] if text in hashes else BLANK for text in texts]

    def _append(self, new: Mapping[str, Scores]) -> None:
        if self._file is None:
            return
        lines = [
            {"text": name, "by": self._by, "unscored" if isinstance(scores, str) else "scores": scores}
            for name, scores in new.items()
        ]
        with disk_errors(Path(self._file.name)):
            self._file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            self._file.flush()


@contextmanager
def open_cache(path: Path | None) -> Iterator[IO[bytes] | None]:
    """The file at `path`, made if there is none, which no other process may use meanwhile; None without a path."""
    if path is None:
        yield None
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise MtError("--cache", f"{path} is a directory, or in one that does not exist", "the name of a file")
    with disk_errors(path):
        file = path.open("a+b")
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MtError("--cache", f"{path} is used by another process", "wait for it, or name another") from None
        except OSError:  # a file system without locks
            pass
        yield file
    finally:
        with suppress(OSError):  # a full disk, which was told when it was written to
            file.close()


def hash_text(text: str) -> str:
    """What stands for a text in the file."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _read_known(file: IO[bytes], by: str) -> dict[str, Scores]:
    """What the scorer of this hash has said; behind it, the file is ready to be added to."""
    known, good = dict[str, Scores](), 0
    file.seek(0)
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            file.truncate(good)
            break
        good += len(line)
        try:
            record = parse_object(line)
            scores: Scores = record["unscored"] if "unscored" in record else {**record["scores"]}
            if record["by"] == by:
                known[record["text"]] = scores
        except (BadLine, KeyError, TypeError) as err:
            allowed = "a file that mt task detoxify wrote; remove the line, or name another with --cache"
            raise MtError(f"{file.name}:{number}", f"is no line of scores ({err})", allowed) from err
    return known
