"""Checkpoints written behind the training's back, one in flight: training waits only for copies in memory.

From a GPU, copies go through page-locked memory, which is allocated once and used again by every save: page-locking
takes 0.45 s a GB, the copy 0.018 s (H200, bench/checkpoint.py).
"""

import sys
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from mt_core.checkpoint.commit_protocol import Ranks, refuse_committed
from mt_core.checkpoint.native import prune, step_directory
from mt_core.checkpoint.step_writer import CheckpointTensors, write

SLAB_BYTES = 1 << 30
ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class HostCopies:
    """Host copies of parts; those from a GPU are whole once `wait` has returned."""

    parts: dict[str, list[tuple[str, Tensor]]]
    events: Sequence[torch.cuda.Event] = ()
    """Recorded on the GPU before the first copy and after the last; none if there is no GPU."""

    def wait(self) -> float:
        """Wait for the copies; returns the seconds that the GPU took for them and for what made the tensors."""
        if not self.events:
            return 0.0
        before, after = self.events
        after.synchronize()
        return before.elapsed_time(after) / 1e3


@dataclass(slots=True)
class PinnedMemory:
    """Page-locked memory, handed out piece by piece and taken back all at once."""

    slabs: list[Tensor] = field(default_factory=list)
    slab: int = 0
    used: int = 0

    def reserve(self, nbytes: int) -> None:
        """Have one slab of at least so many bytes."""
        runtime: Any = torch.cuda.cudart()
        slab = torch.empty(max(nbytes, SLAB_BYTES), dtype=torch.uint8)
        torch.cuda.check_error(int(runtime.cudaHostRegister(slab.data_ptr(), slab.nbytes, 0)))
        weakref.finalize(slab, runtime.cudaHostUnregister, slab.data_ptr()).atexit = False
        self.slabs.append(slab)

    def reset(self) -> None:
        """Everything handed out is free again."""
        self.slab = self.used = 0

    def take(self, like: Tensor) -> Tensor:
        """Memory for a tensor of this shape and dtype, contiguous."""
        while self.slab < len(self.slabs) and self.used + like.nbytes > self.slabs[self.slab].nbytes:
            self.slab, self.used = self.slab + 1, 0
        if self.slab == len(self.slabs):
            self.reserve(like.nbytes)
        piece = self.slabs[self.slab][self.used : self.used + like.nbytes]
        self.used += -(-like.nbytes // ALIGNMENT) * ALIGNMENT
        return piece.view(like.dtype).view(like.shape)


class HostCopier:
    """Takes copies of parts; those of the last call are overwritten by the next."""

    def __init__(self) -> None:
        self.pinned = PinnedMemory()

    def take(self, parts: CheckpointTensors) -> HostCopies:
        """Copy every tensor: from a GPU without waiting for it, in the order of its current stream."""
        self.pinned.reset()
        if not torch.cuda.is_initialized():
            return HostCopies({part: list(self._copied(tensors)) for part, tensors in parts.items()})
        before, after = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
        before.record()
        copies = {part: list(self._copied(tensors)) for part, tensors in parts.items()}
        after.record()
        return HostCopies(copies, (before, after))

    def _copied(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            value = tensor.detach()
            if value.is_cuda:
                yield name, self.pinned.take(value).copy_(value, non_blocking=True)
            else:
                yield name, value.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """A committed checkpoint, and what it took."""

    step: int
    path: Path
    rank_bytes: int
    """Written by this rank."""
    total_bytes: int | None
    """Written by all ranks; known to the first rank alone."""
    waited_s: float
    """How long training stood still before, until the checkpoint before was committed."""
    pause_s: float
    """How long training stood still for the copies: this process or its GPU, whichever was longer."""
    write_s: float
    """Until this rank's files were on the disk, behind the training's back."""
    commit_s: float
    """From there until the checkpoint was committed: waiting for the other ranks, and the commit."""


@dataclass(frozen=True, slots=True)
class _PendingSave:
    step: int
    waited_s: float
    host_s: float
    outcome: Future[SavedCheckpoint]


class AsyncWriter:
    """Every rank of a run has one and calls `save` for the same steps, `poll` at every step, `wait` before it leaves.

    A kill at any moment leaves the last committed checkpoint as it was. A failure of any rank is raised on every rank
    by the next call of a method here: one `MtError` on the first rank naming all that failed. A process that ends
    without `wait` finishes its own files first, and commits them if no other rank's are missing.
    """

    def __init__(
        self, run: Path, ranks: Ranks | None = None, *, tokenizer_files: Sequence[Path] = (), keep: int = 0
    ) -> None:
        """`keep`: how many of the newest checkpoints the first rank leaves after each commit; 0 leaves all."""
        self._run, self._ranks, self._keep = run, ranks or Ranks(), keep
        self._tokenizer_files = tokenizer_files
        self._copies = HostCopier()
        self._pending: _PendingSave | None = None
        self._thread: Thread | None = None
        """Joined, and no daemon: an interpreter that ends while a thread frees tensors aborts the process."""

    def reserve(self, nbytes: int) -> None:
        """Page-lock memory for what this rank owns on a GPU; else the first save pauses for it, 0.45 s a GB."""
        self._copies.pinned.reserve(nbytes)

    def save(self, step: int, parts: CheckpointTensors, meta: Mapping[str, Any]) -> SavedCheckpoint | None:
        """Copy the tensors that this rank owns and have them written; returns before that is done.

        Waits first for a checkpoint in pending, and returns it. `parts` may gather tensors from other ranks as they are
        taken: all ranks are then at the same place, and none waits for a disk.
        """
        asked = time.perf_counter()
        earlier = self._wait_for_room(step)
        path = step_directory(self._run, step)
        refuse_committed(path)
        start = time.perf_counter()
        copies = self._copies.take(parts)
        pending = _PendingSave(step, start - asked, time.perf_counter() - start, Future())
        self._pending = pending
        self._thread = Thread(target=self._write, args=(pending, path, copies, meta), name=f"save step {step}")
        self._thread.start()
        return earlier

    def poll(self) -> SavedCheckpoint | None:
        """The checkpoint in pending if it is committed by now, else None at once; raises its failure."""
        return self.wait() if self._pending and self._pending.outcome.done() else None

    def wait(self) -> SavedCheckpoint | None:
        """Wait until nothing is in flight; returns the checkpoint that was, or raises its failure."""
        if not self._pending:
            return None
        outcome = self._pending.outcome
        try:
            return outcome.result()
        finally:
            if outcome.done():  # not so if the wait was interrupted
                self._pending = None
                assert self._thread, "it has the outcome"
                self._thread.join()

    def _wait_for_room(self, step: int) -> SavedCheckpoint | None:
        if self._pending and not self._pending.outcome.done() and self._ranks.rank == 0:
            notice = f"the checkpoint of step {self._pending.step} is still being written"
            print(f"mt: {notice}; step {step} waits for it", file=sys.stderr, flush=True)
        return self.wait()

    def _write(self, pending: _PendingSave, path: Path, copies: HostCopies, meta: Mapping[str, Any]) -> None:
        try:
            pause_s = max(pending.host_s, copies.wait())
            done = write(path, copies.parts, meta, self._tokenizer_files, ranks=self._ranks)
            if self._keep and self._ranks.rank == 0:
                prune(self._run, self._keep)
            times = {"waited_s": pending.waited_s, "pause_s": pause_s, **asdict(done)}
            pending.outcome.set_result(SavedCheckpoint(step=pending.step, path=path, **times))
        except BaseException as err:
            pending.outcome.set_exception(err)
