"""How two checkpoints differ: settings, and tensor by tensor what is missing, of another shape or dtype, or unequal.

The result is printed as lines for a person or as JSON.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mt_ckpt.tensor_streams.streams import align_streams
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.config.sections import Section
from mt_core.contracts import CheckpointLoader
from mt_core.progress import progress

BLOCK = 1 << 22
"""Numbers compared at a time: 32 MB in fp64, in which every dtype is exact."""

HOW_NOT_WHAT = ("attention.core", "vocab_divisor")
"""Settings that say how to compute a model, not what it is."""


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
    options: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {}),
    tolerance: Tolerance | None = None,
) -> Differences:
    """Compare two checkpoints of any formats, one tensor at a time."""
    a, b = map(open_checkpoint, (left, right), loaders, options)
    settings = tuple(changed_settings(a, b))
    return Differences(settings, tuple(_tensors(a, b, tolerance or Tolerance())))


def changed_settings(left: CheckpointLoader, right: CheckpointLoader) -> Iterator[tuple[str, Any, Any]]:
    """Path, left value and right value of each setting of the model in which two checkpoints differ."""
    ours, theirs = (dict(_flat(_values(loader))) for loader in (left, right))
    for path in {**ours, **theirs}:
        if ours.get(path) != theirs.get(path) and path not in HOW_NOT_WHAT:
            yield path, ours.get(path), theirs.get(path)


def _values(loader: CheckpointLoader) -> dict[str, Any]:
    config = loader.config()
    assert isinstance(config, Section)
    return config.model_dump(mode="json")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _tensors(a: Any, b: Any, tolerance: Tolerance) -> Iterator[TensorDifference]:
    with progress("comparing", len(a.config().canonical_shapes()), "tensors") as advance:
        for name, (left, right) in align_streams([a.tensors(), b.tensors()]):
            yield compare_tensors(name, left, right, tolerance)
            advance(1)


def compare_tensors(name: str, left: Tensor | None, right: Tensor | None, tolerance: Tolerance) -> TensorDifference:
    """One tensor of two checkpoints; None for one that is missing."""
    if left is None or right is None or left.shape != right.shape:
        return TensorDifference(name, _describe(left), _describe(right), different=True)
    numbers, maximum, largest = 0, 0.0, 0.0
    for block in zip(left.reshape(-1).split(BLOCK), right.reshape(-1).split(BLOCK), strict=True):
        beyond, off, size = _compare_block(*block, tolerance)
        numbers, maximum, largest = numbers + beyond, max(maximum, off), max(largest, size)
    relative = 0.0 if maximum == 0 else maximum / largest if largest else math.inf
    different = numbers > 0 or (tolerance.exact and left.dtype != right.dtype)
    return TensorDifference(name, _describe(left), _describe(right), different, numbers, maximum, relative)


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


def _describe(tensor: Tensor | None) -> tuple[list[int], str] | None:
    return None if tensor is None else (list(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def format_lines(differences: Differences) -> Iterator[str]:
    """Each setting and tensor that differs, then a count."""
    for path, left, right in differences.settings:
        yield f"  setting   {path}: {left} in A, {right} in B"
    width = max((len(tensor.name) for tensor in differences.tensors if _is_listed(tensor)), default=0)
    yield from (f"  {_kind(t):<9} {t.name:<{width}}  {_text(t)}" for t in differences.tensors if _is_listed(t))
    different = sum(tensor.different for tensor in differences.tensors)
    yield f"{len(differences.tensors)} tensors: {len(differences.tensors) - different} the same, {different} different"


def to_json(differences: Differences) -> dict[str, Any]:
    """Plain values: `same`, `settings` and every tensor; numbers that JSON lacks are text."""
    settings = [{"path": path, "left": left, "right": right} for path, left, right in differences.settings]
    return {
        "same": differences.same,
        "settings": settings,
        "tensors": [_plain(tensor) for tensor in differences.tensors],
    }


def _plain(tensor: TensorDifference) -> dict[str, Any]:
    values = asdict(tensor)
    for side in ("left", "right"):
        values[side] = values[side] and dict(zip(("shape", "dtype"), values[side], strict=True))
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _is_listed(tensor: TensorDifference) -> bool:
    return tensor.different or tensor.maximum != 0


def _kind(tensor: TensorDifference) -> str:
    if tensor.left is None or tensor.right is None:
        return "missing"
    if tensor.maximum is None:
        return "shape"
    return ("dtype" if not tensor.numbers else "values") if tensor.different else "close"


def _text(tensor: TensorDifference) -> str:
    if tensor.left is None or tensor.right is None:
        return "only in B" if tensor.left is None else "only in A"
    if tensor.maximum is None:
        return f"{tensor.left[0]} in A, {tensor.right[0]} in B"
    dtypes = f"{tensor.left[1]} in A, {tensor.right[1]} in B; " if tensor.left[1] != tensor.right[1] else ""
    return f"{dtypes}{tensor.numbers} numbers differ by at most {tensor.maximum:.3g}, relative {tensor.relative:.3g}"
