"""Gradients that are infinite or not a number: found without waiting for the GPU at every step, and told by rank and
parameter."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mt_core.distributed.mesh import Mesh
from mt_core.training.step import Update


class _Noted(NamedTuple):
    step: int
    loss: Tensor
    update: Update


class Finiteness:
    """Notes every step's values where they are and looks at them only when asked. Bad steps changed no weight."""

    def __init__(self, names: Sequence[str], mesh: Mesh) -> None:
        """`names` are those of this rank's masters."""
        self._names, self._mesh = names, mesh
        self._noted: list[_Noted] = []

    def note(self, step: int, loss: Tensor, update: Update) -> None:
        """Remember a step: this rank's share of its loss, and what the update found."""
        self._noted.append(_Noted(step, loss, update))

    def bad_steps(self) -> list[str]:
        """A line for each bad step since the last call. Every rank must call it at the same step."""
        noted, self._noted = self._noted, []
        if not noted:
            return []
        finite = torch.stack([n.update.norm for n in noted]).isfinite().tolist()
        return [self._tell(n) for n, good in zip(noted, finite, strict=True) if not good]

    def _tell(self, noted: _Noted) -> str:
        bad = (~noted.update.own_norms.isfinite()).nonzero()
        first = self._names[int(bad[0])] if len(bad) else None
        mine = (float(noted.loss), first)
        everyone: list[tuple[float, str | None]] = [mine] * self._mesh.world.size
        if self._mesh.world.size > 1:
            dist.all_gather_object(everyone, mine)
        losses = [f"{loss} on rank {r}" for r, (loss, _) in enumerate(everyone) if not torch.tensor(loss).isfinite()]
        rank, name = next(((r, name) for r, (_, name) in enumerate(everyone) if name), (0, "none of its parts"))
        told = f"the loss is {', '.join(losses)}" if losses else "the loss is finite"
        return f"step {noted.step}: {told}; first bad gradient: {name} (rank {rank})"
