"""Copies in host memory that training can go on beside: what an asynchronous save pauses for.

From a GPU they go through page-locked memory, which is allocated once and used again by every save: page-locking takes
0.45 s a GB, the copy 0.018 s (H200, bench/checkpoint.py).
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mt_core.checkpoint.step_writer import Parts

SLAB_BYTES = 1 << 30
ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Copies:
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


class HostCopies:
    """Takes copies of parts; those of the last call are overwritten by the next."""

    def __init__(self) -> None:
        self.pinned = PinnedMemory()

    def take(self, parts: Parts) -> Copies:
        """Copy every tensor: from a GPU without waiting for it, in the order of its current stream."""
        self.pinned.reset()
        if not torch.cuda.is_initialized():
            return Copies({part: list(self._copied(tensors)) for part, tensors in parts.items()})
        before, after = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
        before.record()
        copies = {part: list(self._copied(tensors)) for part, tensors in parts.items()}
        after.record()
        return Copies(copies, (before, after))

    def _copied(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            value = tensor.detach()
            if value.is_cuda:
                yield name, self.pinned.take(value).copy_(value, non_blocking=True)
            else:
                yield name, value.clone(memory_format=torch.contiguous_format)
