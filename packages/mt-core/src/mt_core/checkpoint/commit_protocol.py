"""How many ranks write one step directory, through nothing but files: no collective, so no rank waits inside one.

RUN/.step-00001000.tmp/          the first rank makes it; a leftover of a killed run is cleared before
    begun                        names the session, so that no rank takes a leftover for today's directory
    done/00003.json              a rank's report: its files and their sizes, or why it failed
    model/rank-00003-of-00008-00001.safetensors
RUN/step-00001000/               the same directory, renamed once every report is there
    meta.json                    with all files and sizes
    COMMITTED                    last of all: without it the step does not exist
"""

import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from mt_core.errors import MtError, Problem
from mt_core.files import TEMPORARY, atomic_file, sync_directory

FORMAT = 2
COMMITTED, META = "COMMITTED", "meta.json"
BEGUN, DONE = "begun", "done"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.01, 0.25

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks that write a checkpoint together, and which of them this is."""

    rank: int = 0
    size: int = 1
    session: str = ""
    """A text that all ranks share and that differs at every start of the run: marks leftovers as such."""
    timeout_s: float = 600.0
    """How long to wait for another rank while nothing at all is being written."""

    @property
    def prefix(self) -> str:
        """How the names of this rank's files begin."""
        return f"rank-{self.rank:05d}-of-{self.size:05d}"

    def label(self, path: Path, rank: int | None = None) -> str:
        """The step directory and, if there are several ranks, the one that is meant (this one)."""
        return f"{path} (rank {self.rank if rank is None else rank} of {self.size})" if self.size > 1 else str(path)


def poll_until(
    ready: Callable[[], Result | None],
    *,
    timeout_s: float,
    late: Callable[[], MtError],
    progress: Callable[[], object] = lambda: None,
) -> Result:
    """The first result of `ready` that is not None; raises `late()` once `progress()` has not changed for `timeout_s`.

    Looks ever less often, and takes part in no collective. Raises `late()` too where the process wants to end: the
    interpreter waits for the thread that is in here.
    """
    pause, seen, since = FIRST_PAUSE_S, progress(), time.monotonic()
    while (result := ready()) is None:
        if (now := progress()) != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > timeout_s or not threading.main_thread().is_alive():
            raise late()
        time.sleep(pause)
        pause = min(pause * 1.5, LONGEST_PAUSE_S)
    return result


def temporary_directory(path: Path) -> Path:
    """Where the step directory `path` is written before it has its name."""
    return path.with_name(f".{path.name}{TEMPORARY}")


def begin(path: Path, ranks: Ranks) -> Path:
    """The temporary directory of `path`: the first rank makes it, the others wait until it is there."""
    refuse_committed(path)
    temporary = temporary_directory(path)
    if ranks.rank == 0:
        _clear_unfinished(path)
        (temporary / DONE).mkdir(parents=True)
        with atomic_file(temporary / BEGUN, "w") as file:
            file.write(ranks.session)
        return temporary

    def ready() -> bool | None:
        with suppress(OSError):
            return (temporary / BEGUN).read_text() == ranks.session or None
        return None

    actual = f"rank 0 has not begun this checkpoint in {ranks.timeout_s:g} s"
    late = MtError(ranks.label(path), actual, "is rank 0 alive, and do all ranks see the same directory?")
    poll_until(ready, timeout_s=ranks.timeout_s, late=lambda: late)
    return temporary


def refuse_committed(path: Path) -> None:
    """A committed step is never written again."""
    if (path / COMMITTED).exists():
        raise MtError(str(path), "already exists", "choose another directory or remove it")


def _clear_unfinished(path: Path) -> None:
    """Remove what killed runs left: this rank begins one checkpoint at a time, so none of it is being written."""
    if path.exists():
        shutil.rmtree(path)
    for leftover in [*path.parent.glob(f".step-*{TEMPORARY}"), *path.parent.glob(f"step-*{TEMPORARY}")]:
        if leftover.is_dir():
            shutil.rmtree(leftover)


def report_done(temporary: Path, ranks: Ranks, tensors: Sequence[str], files: Sequence[Path]) -> None:
    """Report to the first rank that these files of this rank are on the disk."""
    for directory in {file.parent for file in files}:
        sync_directory(directory)
    sizes = {str(file.relative_to(temporary)): file.stat().st_size for file in files}
    _report(temporary, ranks, {"files": sizes, "tensors": list(tensors)})


def report_failure(temporary: Path, ranks: Ranks, error: BaseException) -> None:
    """Report to the first rank why this one failed, if the disk allows; removes its own files first, to make room."""
    for file in temporary.glob(f"*/{ranks.prefix}-*"):
        file.unlink(missing_ok=True)
    problems = [
        [p.where, p.actual, p.allowed] for p in describe_problems(error, ranks.label(final_directory(temporary)))
    ]
    with suppress(MtError, OSError):
        _report(temporary, ranks, {"problems": problems})


def final_directory(temporary: Path) -> Path:
    """The step directory that a temporary one becomes."""
    return temporary.with_name(temporary.name.removeprefix(".").removesuffix(TEMPORARY))


def describe_problems(error: BaseException, where: str) -> Sequence[Problem]:
    """What went wrong, as lines for the user."""
    if isinstance(error, MtError):
        return error.problems
    return [Problem(where, f"{type(error).__name__}: {error}", "nothing was committed")]


def _report(temporary: Path, ranks: Ranks, document: Mapping[str, Any]) -> None:
    with atomic_file(temporary / DONE / f"{ranks.rank:05d}.json", "w") as file:
        json.dump(document, file)


def collect(temporary: Path, path: Path, ranks: Ranks) -> list[dict[str, Any]]:
    """The first rank waits for all reports; one `MtError` names every rank that has failed by then."""
    reports: dict[int, dict[str, Any]] = {}

    def ready() -> bool | None:
        for file in (temporary / DONE).glob("?????.json"):
            if int(file.stem) not in reports:
                reports[int(file.stem)] = json.loads(file.read_text())
        if problems := [Problem(*p) for report in reports.values() for p in report.get("problems", ())]:
            raise MtError.from_problems(problems)
        return len(reports) == ranks.size or None

    def late() -> MtError:
        missing = ", ".join(str(rank) for rank in range(ranks.size) if rank not in reports)
        actual = f"ranks that have not finished: {missing}; nothing has been written for {ranks.timeout_s:g} s"
        return MtError(str(path), actual, "are they alive? nothing was committed")

    poll_until(ready, timeout_s=ranks.timeout_s, late=late, progress=lambda: written_bytes(temporary))
    return [reports[rank] for rank in range(ranks.size)]


def written_bytes(directory: Path) -> int:
    """Bytes in all files under a directory that others are writing."""
    total = 0
    with suppress(FileNotFoundError):
        for file in directory.rglob("*"):
            with suppress(FileNotFoundError):
                total += file.stat().st_size
    return total


def commit(temporary: Path, path: Path, meta: Mapping[str, Any], reports: Sequence[Mapping[str, Any]]) -> int:
    """The first rank makes the directory a checkpoint; returns the bytes in it."""
    tensors = [name for report in reports for name in report["tensors"]]
    assert len(tensors) == len(set(tensors)), f"written twice: {sorted({n for n in tensors if tensors.count(n) > 1})}"
    files = {name: size for report in reports for name, size in report["files"].items()}
    for name, size in files.items():
        assert (temporary / name).stat().st_size == size, f"{name} has changed since its rank reported it"
    versions = {"torch": version("torch"), "mt-core": version("mt-core")}
    document = {"format": FORMAT, **meta, "versions": versions, "files": dict(sorted(files.items()))}
    with atomic_file(temporary / META, "w") as file:
        file.write(json.dumps(document, indent=2) + "\n")
    (temporary / BEGUN).unlink()
    shutil.rmtree(temporary / DONE)
    sync_directory(temporary)
    temporary.rename(path)
    sync_directory(path.parent)
    with atomic_file(path / COMMITTED) as mark:
        mark.write(b"")
    return sum(files.values())


def await_commit(temporary: Path, path: Path, ranks: Ranks) -> None:
    """Every other rank waits until the first has committed, or has given up."""

    def ready() -> bool | None:
        if (path / COMMITTED).exists():
            return True
        if was_discarded(temporary, path):
            raise discarded(path, ranks)
        return None

    actual = f"rank 0 has not committed it, and nothing has been written for {ranks.timeout_s:g} s"
    late = MtError(ranks.label(path), actual, "is rank 0 alive?")
    poll_until(ready, timeout_s=ranks.timeout_s, late=lambda: late, progress=lambda: written_bytes(temporary))


def was_discarded(temporary: Path, path: Path) -> bool:
    """Whether the first rank has given up a checkpoint that had begun."""
    return not temporary.exists() and not path.exists()


def discarded(path: Path, ranks: Ranks) -> MtError:
    """The error that ranks raise which did not fail themselves."""
    return MtError(ranks.label(path), "was given up because another rank failed", "rank 0 says why")


def discard(temporary: Path, path: Path) -> None:
    """The first rank gives up: renamed first, so that no rank adds to it, then removed."""
    doomed = temporary.with_name(f".{path.name}.discarded{TEMPORARY}")
    with suppress(OSError):
        temporary.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
    if path.exists() and not (path / COMMITTED).exists():
        shutil.rmtree(path, ignore_errors=True)
