"""Optimizer tensors that 0.11 stores as flat pieces of each rank's share (`fully_sharded_model_space`), as boxes.

Source: docs/specs/checkpoints.md §2.6.

Stored shape (F_0 … F_k, m) of a tensor (o_0 … o_k): the share at fragment (i_0 … i_k) is a box of l_j = o_j / F_j in
each dim, flat; data ranks hold pieces of it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mt_ckpt.megatron.dist_format.metadata import Chunk, Shape, Stored
from mt_core.errors import MtError


@dataclass(frozen=True)
class Pieces(Chunk):
    """A box made of flat pieces, in order."""

    pieces: tuple[Chunk, ...] = ()

    def read(self) -> Tensor:
        """The box."""
        return torch.cat([piece.read().reshape(-1) for piece in self.pieces]).reshape(self.sizes)


def unflatten(key: str, one: Stored) -> Stored:
    """The tensor with boxes of its own shape as chunks; one that is stored so already stays as it is."""
    if one.original is None or one.size is None:
        return one
    *fragments, numel = one.size
    local = tuple(whole // count for whole, count in zip(one.original, fragments, strict=True))
    if math.prod(local) != numel:
        problem = f"is stored as {one.size}, which does not hold pieces of {one.original}"
        raise MtError(key, problem, "use another iteration")
    pieces: dict[Shape, list[Chunk]] = {}
    for chunk in one.chunks:
        pieces.setdefault(chunk.offsets[:-1], []).append(chunk)
    return Stored(tuple(one.original), [_box(at, local, flat) for at, flat in sorted(pieces.items())])


def _box(at: Shape, local: Shape, pieces: list[Chunk]) -> Chunk:
    ordered = tuple(sorted(pieces, key=lambda piece: piece.offsets[-1]))
    numel = sum(piece.sizes[-1] for piece in ordered)
    offsets = tuple(number * size for number, size in zip(at, local, strict=True))
    sizes = local if numel == math.prod(local) else (0,) * len(local)  # so that what is missing is reported
    return Pieces(Path(), 0, 0, offsets, sizes, ordered)


def unflatten_all(stored: Mapping[str, Stored], weights: Mapping[str, Stored]) -> dict[str, Stored]:
    """Every tensor by `unflatten`.

    `weights`, by the same keys, tell the shape where metadata does not: 0.11 writes none of its own beside a torch of
    today (2.11 was run).
    """
    return {key: unflatten(key, _with_shape(one, weights.get(key))) for key, one in stored.items()}


def _with_shape(one: Stored, weight: Stored | None) -> Stored:
    flat = weight and weight.size and one.size and len(one.size) == len(weight.size) + 1
    return replace(one, original=weight.size) if weight and flat and one.original is None else one
