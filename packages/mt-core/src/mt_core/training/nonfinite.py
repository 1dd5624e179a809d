"""Detects gradients that are infinite or not a number without waiting for the GPU at every step.

A bad step is reported with the rank and parameter of its first non-finite gradient.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mt_core.distributed.mesh import Mesh
from mt_core.training.step import Update

NO_PARAMETER = "no single parameter was non-finite (overflow in the norm)"


class _RecordedStep(NamedTuple):
    step: int
    loss: Tensor
    update: Update


class NonFiniteMonitor:
    """Records every step's values on their device and reads them only when asked. Bad steps changed no weight."""

    def __init__(self, names: Sequence[str], mesh: Mesh) -> None:
        """`names`: the main parameters of this rank, in their order."""
        self._names, self._mesh = names, mesh
        self._recorded: list[_RecordedStep] = []

    def record_step(self, step: int, loss: Tensor, update: Update) -> None:
        """Record a step: this rank's share of its loss, and the norms of its update."""
        self._recorded.append(_RecordedStep(step, loss, update))

    def pop_bad_steps(self) -> list[str]:
        """A line for each bad step since the last call. Every rank must call it at the same step."""
        recorded, self._recorded = self._recorded, []
        if not recorded:
            return []
        finite = torch.stack([n.update.norm for n in recorded]).isfinite().tolist()
        return [self._describe(n) for n, good in zip(recorded, finite, strict=True) if not good]

    def _describe(self, recorded: _RecordedStep) -> str:
        bad = (~recorded.update.local_norms.isfinite()).nonzero()
        first = self._names[int(bad[0])] if len(bad) else None
        mine = (float(recorded.loss), first)
        everyone: list[tuple[float, str | None]] = [mine] * self._mesh.world.size
        if self._mesh.world.size > 1:
            dist.all_gather_object(everyone, mine)
        losses = [f"{loss} on rank {r}" for r, (loss, _) in enumerate(everyone) if not torch.tensor(loss).isfinite()]
        first_bad = next((f"{name} (rank {r})" for r, (_, name) in enumerate(everyone) if name), None)
        cause = f"first bad gradient: {first_bad}" if first_bad else NO_PARAMETER
        losses_text = f"the loss is {', '.join(losses)}" if losses else "the loss is finite"
        return f"step {recorded.step}: {losses_text}; {cause}"
