"""Native checkpoints: RUN/step-00001000/{model,optim,tokenizer}/, meta.json and, written last, COMMITTED.

A step directory is self-contained. What has no COMMITTED mark does not exist for any reader.

A step that someone reads is not pruned: readers share a lock on its COMMITTED mark, pruning wants it alone. The lock is
the kernel's (flock): it ends with the process that has it, however that ends.
"""

import fcntl
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from mt_core.checkpoint.commit_protocol import COMMITTED, FORMAT, META
from mt_core.checkpoint.shard_files import stream_part
from mt_core.checkpoint.step_writer import TOKENIZER, write
from mt_core.config.renamed_keys import translate
from mt_core.errors import MtError, Problem, raise_if
from mt_core.files import disk_errors

READABLE_FORMATS = (1, FORMAT)
"""Format 1 had other names of files: `shard-00001.safetensors`, all written by one rank."""


def step_directory(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lives."""
    return run / f"step-{step:08d}"


def steps(run: Path) -> list[Path]:
    """Committed step directories of a run, oldest first."""
    return sorted(path for path in run.glob("step-????????") if (path / COMMITTED).exists())


def resolve(path: Path) -> Path:
    """The step directory for a run directory (its latest committed step) or for a step directory itself."""
    if (path / META).exists():
        if (path / COMMITTED).exists():
            return path
        raise MtError(str(path), "has no COMMITTED mark: its writing was interrupted", "use an earlier step")
    if committed := steps(path):
        return committed[-1]
    unfinished = sorted(p.name for pattern in ("step-*", ".step-*") for p in path.glob(pattern))
    actual = f"no committed checkpoint (unfinished: {', '.join(unfinished)})" if unfinished else "no checkpoint"
    raise MtError(str(path), actual, "give a run directory, or a step directory with a COMMITTED mark")


def write_model(
    path: Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer_files: Sequence[Path] = (),
) -> None:
    """A run directory at `path` that holds a model alone, as step 0; `config` is the model section as plain values."""
    meta = {"step": 0, "samples": 0, "tokens": 0, "config": {"model": dict(config)}}
    write(step_directory(path, 0), {"model": tensors}, meta, tokenizer_files)


def read_meta(step: Path) -> dict[str, Any]:
    """meta.json, after checking that every file it lists is there with its size; its configuration in today's keys."""
    try:
        meta = json.loads((step / META).read_text())
    except FileNotFoundError as err:
        raise MtError(str(step / META), "missing", "restore it, or use another step") from err
    except ValueError as err:
        raise MtError(str(step / META), f"not JSON ({err})", "use another step") from err
    if meta["format"] not in READABLE_FORMATS:
        formats = " and ".join(map(str, READABLE_FORMATS))
        raise MtError(str(step / META), f"format {meta['format']}", f"this version reads formats {formats}: update mt")
    raise_if(_damaged(step, meta["files"]))
    return meta | {"config": translate(meta["config"])} if "config" in meta else meta


def _damaged(step: Path, files: Mapping[str, int]) -> Iterator[Problem]:
    for name, size in files.items():
        file = step / name
        if not file.exists():
            yield Problem(str(file), "missing", "restore it, or use another step")
        elif file.stat().st_size != size:
            yield Problem(str(file), f"{file.stat().st_size} bytes", f"it was written with {size}: use another step")


@contextmanager
def locked_for_reading(step: Path) -> Iterator[None]:
    """While the block runs, `prune` leaves this step alone, in this process or another; it must be there."""
    mark = step / COMMITTED
    gone = MtError(str(step), "is no longer there: it was pruned", "use a later step")
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


def stream(step: Path, part: str = "model") -> Iterator[tuple[str, Tensor]]:
    """Canonical names and tensors of a part, one at a time, memory-mapped; damaged checkpoints are refused."""
    with locked_for_reading(step):
        read_meta(step)
        yield from stream_part(step / part)


def tokenizer_files(step: Path) -> list[Path]:
    """Files of the tokenizer that travels with the checkpoint."""
    return sorted(path for path in (step / TOKENIZER).glob("*") if path.is_file())


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` committed steps, save those that someone reads.

    The mark goes first, so a half-deleted step is never read; one that is being written has none yet.
    """
    with disk_errors(run):
        for path in steps(run)[:-keep]:
            with _exclusively_locked(path / COMMITTED) as unread:
                if unread:
                    (path / COMMITTED).unlink()
                    shutil.rmtree(path)


@contextmanager
def _exclusively_locked(mark: Path) -> Iterator[bool]:
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
