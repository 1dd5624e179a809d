"""Data parallelism by replication: every rank holds all weights, gradients are summed in buckets."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mt_core.parallel.axis import Axis

BUCKET_ELEMENTS = 40_000_000
"""Gradients are copied into flat buckets of about this size, so that few large sums replace many small ones."""


def sum_gradients(gradients: Sequence[Tensor], axis: Axis) -> None:
    """Sum gradients over the axis, in place. Every rank must pass the same shapes in the same order."""
    if axis.size == 1:
        return
    for bucket in _buckets(gradients):
        flat = axis.sum_(torch.cat([g.flatten() for g in bucket]))
        for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (sum(t.numel() for t in bucket) >= BUCKET_ELEMENTS or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
