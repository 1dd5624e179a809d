"""Where parameters lie in the flat vectors of Megatron's distributed optimizer (docs/specs/checkpoints.md §1.4)."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

ALIGNMENT = 64
"""Elements; every parameter starts at a multiple of it in its bucket."""
SMALLEST, FOR_EACH_RANK = 40_000_000, 1_000_000
"""Elements of a bucket, if the run did not say: the larger of the first and the second times data ranks."""


@dataclass(frozen=True)
class Bucket:
    """A run of parameters; the padding at its end is not in the file."""

    starts: Mapping[str, int]
    numel: int


def lay_out(numels: Mapping[str, int], size: int | None = None, alone: Collection[str] = ()) -> list[Bucket]:
    """Buckets of parameters given in the order of named_parameters(), which the vectors reverse.

    A bucket closes when it has `size` elements, if there is a size; parameters in `alone` have their own.
    """
    buckets: list[Bucket] = []
    starts: dict[str, int] = {}
    end = 0

    def close() -> None:
        nonlocal end, starts
        if starts:
            buckets.append(Bucket(starts, end))
        starts, end = {}, 0

    for name, numel in reversed([*numels.items()]):
        if name in alone:
            close()
        starts[name] = -(-end // ALIGNMENT) * ALIGNMENT
        end = starts[name] + numel
        if name in alone or (size and end >= size):
            close()
    close()
    return buckets


def starts_in_file(buckets: list[Bucket]) -> dict[str, int]:
    """Where each parameter starts in the vector of a file: buckets without their padding, one after another."""
    starts: dict[str, int] = {}
    before = 0
    for bucket in buckets:
        starts |= {name: before + start for name, start in bucket.starts.items()}
        before += bucket.numel
    return starts


def bucket_size(args: Mapping[str, Any], stage: int, chunk: int) -> int | None:
    """Elements at which a run of these arguments closed buckets; None if it had one bucket for all."""
    if not args.get("overlap_grad_reduce") or stage or chunk:
        return None
    return args.get("ddp_bucket_size") or max(SMALLEST, FOR_EACH_RANK * (args.get("data_parallel_size") or 1))
