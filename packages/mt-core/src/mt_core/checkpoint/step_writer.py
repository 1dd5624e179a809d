"""Writing a step directory: this rank's share of it and, on the first rank, the commit."""

import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mt_core.checkpoint import commit_protocol as protocol
from mt_core.checkpoint.commit_protocol import Ranks
from mt_core.checkpoint.safetensors_io import flush_to_disk
from mt_core.checkpoint.shard_files import write_part
from mt_core.files import disk_errors

TOKENIZER = "tokenizer"

CheckpointTensors = Mapping[str, Iterable[tuple[str, Tensor]]]
"""Part → canonical names and whole tensors that this rank owns."""


@dataclass(frozen=True, slots=True)
class WriteResult:
    """Bytes and seconds of one write."""

    rank_bytes: int
    """In this rank's files."""
    total_bytes: int | None
    """In all ranks' files; known to the first rank alone."""
    write_s: float
    """Until this rank's files were on the disk."""
    commit_s: float
    """From there until the checkpoint was committed: waiting for the other ranks, and the commit."""


def write(
    path: Path,
    parts: CheckpointTensors,
    meta: Mapping[str, Any],
    tokenizer_files: Sequence[Path] = (),
    *,
    ranks: Ranks | None = None,
) -> WriteResult:
    """Write this rank's share of a step directory and return when all of it is committed; whole or not at all.

    Tensors are taken one at a time, so they must not need another rank: it may be waiting for a disk. `meta` and the
    tokenizer's files are those of the first rank. Replaces a step that was never committed. If any rank fails, the
    first raises one `MtError` naming each that has failed, the others their own failure or that another one failed.
    """
    ranks = ranks or Ranks()
    temporary = protocol.temporary_directory(path)
    start = time.perf_counter()
    with _discard_on_error(temporary, path, ranks), disk_errors(Path(ranks.label(path))):
        protocol.begin(path, ranks)
        names, files = _write_share(temporary, ranks, parts, tokenizer_files if ranks.rank == 0 else ())
        rank_bytes = sum(file.stat().st_size for file in files)
        protocol.report_done(temporary, ranks, names, files)
        written = time.perf_counter()
        total_bytes = None
        if ranks.rank == 0:
            total_bytes = protocol.commit(temporary, path, meta, protocol.collect(temporary, path, ranks))
        else:
            protocol.await_commit(temporary, path, ranks)
    return WriteResult(rank_bytes, total_bytes, written - start, time.perf_counter() - written)


@contextmanager
def _discard_on_error(temporary: Path, path: Path, ranks: Ranks) -> Iterator[None]:
    protocol.refuse_committed(path)
    try:
        yield
    except BaseException as err:
        if ranks.rank == 0:
            protocol.discard(temporary, path)
        elif isinstance(err, FileNotFoundError) and protocol.was_discarded(temporary, path):
            raise protocol.discarded(path, ranks) from err  # rank 0 discarded it meanwhile
        else:
            protocol.report_failure(temporary, ranks, err)
        raise


def _write_share(
    temporary: Path, ranks: Ranks, parts: CheckpointTensors, tokenizer_files: Sequence[Path]
) -> tuple[list[str], list[Path]]:
    names: list[str] = []
    for part, tensors in parts.items():
        names += [f"{part}/{name}" for name in write_part(temporary / part, tensors, ranks.prefix)]
    files = [file for part in parts for file in sorted((temporary / part).glob(f"{ranks.prefix}-*"))]
    for file in tokenizer_files:
        (temporary / TOKENIZER).mkdir(exist_ok=True)
        copied = Path(shutil.copy(file, temporary / TOKENIZER / file.name))
        flush_to_disk(copied)
        files.append(copied)
    return names, files
