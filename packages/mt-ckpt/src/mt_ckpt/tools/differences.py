"""How two checkpoints differ: settings, and tensor by tensor what is missing, of another shape or dtype, or unequal."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mt_ckpt.tools.configurations import changed_settings
from mt_ckpt.tools.together import align_streams
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.progress import progress

BLOCK = 1 << 22
"""Numbers compared at a time: 32 MB in fp64, in which every dtype is exact."""


@dataclass(frozen=True)
class Tolerance:
    """A number may be off by `absolute` + `relative` × |the left one|. With any tolerance, dtypes may differ."""

    relative: float = 0.0
    absolute: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether nothing may be off."""
        return self.relative == self.absolute == 0


@dataclass(frozen=True)
class TensorDifference:
    """One name in two checkpoints."""

    name: str
    left: tuple[list[int], str] | None
    """Shape and dtype; None if the checkpoint has no such tensor."""
    right: tuple[list[int], str] | None
    different: bool
    """Beyond the tolerance."""
    numbers: int | None = None
    """How many numbers are beyond the tolerance; None where the shapes do not allow to compare."""
    maximum: float | None = None
    """Largest absolute difference; infinity where one side alone is not a number."""
    relative: float | None = None
    """`maximum` as a part of the left tensor's largest number."""


@dataclass(frozen=True)
class Differences:
    """All of two checkpoints."""

    settings: tuple[tuple[str, Any, Any], ...]
    tensors: tuple[TensorDifference, ...]
    """Every name, equal ones included."""

    @property
    def same(self) -> bool:
        """Nothing differs beyond the tolerance."""
        return not self.settings and not any(tensor.different for tensor in self.tensors)


def differences(
    left: Path,
    right: Path,
    *,
    loaders: tuple[str | None, str | None] = (None, None),
    tolerance: Tolerance | None = None,
) -> Differences:
    """Compare two checkpoints of any formats, one tensor at a time."""
    a, b = open_checkpoint(left, loaders[0]), open_checkpoint(right, loaders[1])
    settings = tuple(changed_settings(a, b))
    return Differences(settings, tuple(_tensors(a, b, tolerance or Tolerance())))


def _tensors(a: Any, b: Any, tolerance: Tolerance) -> Iterator[TensorDifference]:
    with progress("comparing", len(a.config().canonical_shapes()), "tensors") as advance:
        for name, (left, right) in align_streams([a.tensors(), b.tensors()]):
            yield compare_tensors(name, left, right, tolerance)
            advance(1)


def compare_tensors(name: str, left: Tensor | None, right: Tensor | None, tolerance: Tolerance) -> TensorDifference:
    """One tensor of two checkpoints; None for one that is missing."""
    if left is None or right is None or left.shape != right.shape:
        return TensorDifference(name, _described(left), _described(right), different=True)
    numbers, maximum, largest = 0, 0.0, 0.0
    for block in zip(left.reshape(-1).split(BLOCK), right.reshape(-1).split(BLOCK), strict=True):
        beyond, off, size = _compare_block(*block, tolerance)
        numbers, maximum, largest = numbers + beyond, max(maximum, off), max(largest, size)
    relative = 0.0 if maximum == 0 else maximum / largest if largest else math.inf
    different = numbers > 0 or (tolerance.exact and left.dtype != right.dtype)
    return TensorDifference(name, _described(left), _described(right), different, numbers, maximum, relative)


def _compare_block(left: Tensor, right: Tensor, tolerance: Tolerance) -> tuple[int, float, float]:
    """How many numbers are beyond the tolerance, the largest difference, the largest number on the left."""
    if not left.numel():
        return 0, 0.0, 0.0
    a, b = left.double(), right.double()
    equal = (a == b) | (a.isnan() & b.isnan())
    off = torch.where(equal, 0.0, (a - b).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    size = a.abs().nan_to_num(nan=0.0, posinf=0.0)
    beyond = off > tolerance.absolute + tolerance.relative * size
    return int(beyond.sum()), off.max().item(), size.max().item()


def _described(tensor: Tensor | None) -> tuple[list[int], str] | None:
    return None if tensor is None else (list(tensor.shape), str(tensor.dtype).removeprefix("torch."))
