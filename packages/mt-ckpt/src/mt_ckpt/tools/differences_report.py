"""Differences of two checkpoints as lines for a person or as JSON."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from mt_ckpt.tools.differences import Differences, TensorDifference


def as_lines(differences: Differences) -> Iterator[str]:
    """Each setting and tensor that differs, then a count."""
    for path, left, right in differences.settings:
        yield f"  setting   {path}: {left} in A, {right} in B"
    width = max((len(tensor.name) for tensor in differences.tensors if _is_listed(tensor)), default=0)
    yield from (f"  {_kind(t):<9} {t.name:<{width}}  {_text(t)}" for t in differences.tensors if _is_listed(t))
    different = sum(tensor.different for tensor in differences.tensors)
    yield f"{len(differences.tensors)} tensors: {len(differences.tensors) - different} the same, {different} different"


def as_json(differences: Differences) -> dict[str, Any]:
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
