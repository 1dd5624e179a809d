"""Native checkpoints: RUN/step-00001000/{model,optim,tokenizer}/, meta.json and, written last, COMMITTED.

A step directory is self-contained. What has no COMMITTED mark does not exist for any reader.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from mt_core.checkpoint.parts import stream_part, write_part
from mt_core.errors import MtError, Problem, raise_if
from mt_core.files import atomic_directory, atomic_file, disk_errors

FORMAT = 1
COMMITTED, META, TOKENIZER = "COMMITTED", "meta.json", "tokenizer"

Parts = Mapping[str, Iterable[tuple[str, Tensor]]]


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
    unfinished = sorted(p.name for p in path.glob("step-*"))
    found = f"no committed checkpoint (unfinished: {', '.join(unfinished)})" if unfinished else "no checkpoint"
    raise MtError(str(path), found, "give a run directory, or a step directory with a COMMITTED mark")


def write(path: Path, parts: Parts, meta: Mapping[str, Any], tokenizer_files: Sequence[Path] = ()) -> None:
    """Write a step directory, whole or not at all; replaces one that was never committed."""
    if path.exists() and not (path / COMMITTED).exists():
        shutil.rmtree(path)
    with atomic_directory(path) as temporary:
        for part, tensors in parts.items():
            write_part(temporary / part, tensors)
        if tokenizer_files:
            (temporary / TOKENIZER).mkdir()
            for file in tokenizer_files:
                shutil.copy(file, temporary / TOKENIZER / file.name)
        files = {str(f.relative_to(temporary)): f.stat().st_size for f in sorted(temporary.rglob("*")) if f.is_file()}
        versions = {"torch": version("torch"), "mt-core": version("mt-core")}
        document = {"format": FORMAT, **meta, "versions": versions, "files": files}
        (temporary / META).write_text(json.dumps(document, indent=2) + "\n")
    with atomic_file(path / COMMITTED) as mark:
        mark.write(b"")


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
    """meta.json, after checking that every file it lists is there with its size."""
    try:
        meta = json.loads((step / META).read_text())
    except ValueError as err:
        raise MtError(str(step / META), f"not JSON ({err})", "use another step") from err
    if meta["format"] != FORMAT:
        raise MtError(str(step / META), f"format {meta['format']}", f"this version reads format {FORMAT}: update mt")
    raise_if(_damaged(step, meta["files"]))
    return meta


def _damaged(step: Path, files: Mapping[str, int]) -> Iterator[Problem]:
    for name, size in files.items():
        file = step / name
        if not file.exists():
            yield Problem(str(file), "missing", "restore it, or use another step")
        elif file.stat().st_size != size:
            yield Problem(str(file), f"{file.stat().st_size} bytes", f"it was written with {size}: use another step")


def stream(step: Path, part: str = "model") -> Iterator[tuple[str, Tensor]]:
    """Canonical names and tensors of a part, one at a time, memory-mapped; damaged checkpoints are refused."""
    read_meta(step)
    yield from stream_part(step / part)


def tokenizer_files(step: Path) -> list[Path]:
    """Files of the tokenizer that travels with the checkpoint."""
    return sorted(path for path in (step / TOKENIZER).glob("*") if path.is_file())


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` committed steps; the mark goes first, so a half-deleted step is never read."""
    with disk_errors(run):
        for path in steps(run)[:-keep]:
            (path / COMMITTED).unlink()
            shutil.rmtree(path)
