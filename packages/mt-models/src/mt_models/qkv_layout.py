"""The layout of fused projections to queries, keys and values: interleaved by group, as Megatron stores them too.

Each of the G key/value groups has R query heads, then its key head, then its value head, of K features each. A fused
tensor is [G, R+2, K, …], one of keys and values alone [G, 2, K, …]; its parts are q [G·R·K, …] and k, v [G·K, …]. The
remaining dims are a weight's inputs, or none for a bias.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def fuse_qkv(q: Tensor, k: Tensor, v: Tensor, *, head_size: int) -> Tensor:
    """Interleave q [G·R·K, …], k [G·K, …] and v [G·K, …] into a new tensor [G, R+2, K, …]."""
    return _fuse((q, k, v), head_size)


def split_qkv(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take q [G·R·K, …], k [G·K, …] and v [G·K, …] out of [G, R+2, K, …]: the inverse of `fuse_qkv`."""
    q, k, v = qkv.split((qkv.shape[1] - 2, 1, 1), dim=1)
    return q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2)


def fuse_kv(k: Tensor, v: Tensor, *, head_size: int) -> Tensor:
    """Interleave k [G·K, …] and v [G·K, …] into a new tensor [G, 2, K, …]."""
    return _fuse((k, v), head_size)


def split_kv(kv: Tensor) -> tuple[Tensor, Tensor]:
    """Take k [G·K, …] and v [G·K, …] out of [G, 2, K, …]: the inverse of `fuse_kv`; both may be views."""
    k, v = kv.unbind(1)
    return k.flatten(0, 1), v.flatten(0, 1)


def interleave_rows(parts: Sequence[Tensor], groups: int) -> Iterator[Tensor]:
    """Views of q, k, v (or of k, v) whose concatenation is the fused tensor with its first three dims flattened.

    For writers that store a fused tensor [G·(R+2)·K, …] piece by piece, without a copy of it in memory.
    """
    for group in zip(*(part.chunk(groups) for part in parts), strict=True):
        yield from group


def _fuse(parts: Sequence[Tensor], head_size: int) -> Tensor:
    groups = len(parts[-1]) // head_size
    return torch.cat([part.unflatten(0, (groups, -1, head_size)) for part in parts], dim=1)
