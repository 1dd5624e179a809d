"""Optimizer tensors that Megatron's main stores by default: flat buckets of each model-parallel rank
(`dp_reshardable`, docs/specs/checkpoints.md §2.6), as canonical tensors.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mt_ckpt.megatron.dist_format.metadata import Stored
from mt_ckpt.megatron.optimizer.buckets import Bucket, bucket_size, lay_out
from mt_ckpt.megatron.optimizer.param_groups import by_optimizer, tied_across_stages
from mt_ckpt.megatron.parameters.fusion import canonical, join
from mt_ckpt.megatron.parameters.names import list_parameters
from mt_ckpt.megatron.placement import PlacedParameter, Placement, named_parameters
from mt_core.errors import MtError, Problem, raise_if

KEY = re.compile(
    r"(?:chained_(\d+)\.)?optimizer\.distributed\.dp_group_idx_(\d+)\.gbuf_idx_(\d+)\.dtype_(.+)\.bucket_idx_(\d+)"
    r"\.(param|exp_avg|exp_avg_sq)"
)

Slot = tuple[Stored, int]
"""A bucket and where in it a parameter starts."""
Slots = Mapping[str, Mapping[int, Slot]]
"""Name in the whole model → tensor rank → where it lies."""


class BucketIndex(NamedTuple):
    """Which bucket. Ranks of a stage that hold the same share a group: of the experts' optimizer, each is its own."""

    optimizer: int
    group: int
    chunk: int
    number: int

    def __str__(self) -> str:
        """What to call it in a message."""
        of = f"bucket {self.number} of chunk {self.chunk}, model-parallel rank {self.group}"
        return f"{of} of experts" if self.optimizer else of


def locate_parameters(stored: Mapping[str, Stored], key: str, placement: Placement, args: Mapping[str, Any]) -> Slots:
    """Where every parameter lies in the buckets of `key`; `MtError` names all whose size is not as args say."""
    buckets = {BucketIndex(*(int(m[n] or 0) for n in (1, 2, 3, 5))): bucket for name, bucket in stored.items()
            if (m := KEY.fullmatch(name)) and m[6] == key}  # fmt: skip
    slots: dict[str, dict[int, Slot]] = {}
    problems: list[Problem] = []
    for index, parameters, expected in _expect_buckets(placement, args):
        bucket = buckets.pop(index, None)
        if bucket is None or bucket.size != (expected.numel,):
            problem = "is missing" if bucket is None else f"has {bucket.size} elements"
            problems.append(Problem(str(index), problem, f"the parameters that args put there take {expected.numel}"))
            continue
        for local, start in expected.starts.items():
            tensor_rank = index.group % placement.layout.tensor
            slots.setdefault(parameters[local].name, {})[tensor_rank] = bucket, start
    problems += [Problem(str(index), "unexpected", "args describe no such bucket") for index in buckets]
    raise_if(problems)
    return slots


def _expect_buckets(
    placement: Placement, args: Mapping[str, Any]
) -> Iterator[tuple[BucketIndex, Mapping[str, PlacedParameter], Bucket]]:
    """Every bucket that the args describe, with the parameters of its chunk by local name."""
    layout = placement.layout
    alone = tied_across_stages(placement.config, layout.pipeline)
    for expert in range(layout.expert):
        for (stage, chunk), parameters in named_parameters(placement, expert).items():
            numels = {local: place.shard_numel for local, place in parameters.items()}
            for optimizer, members in enumerate(by_optimizer(numels, layout.expert)):
                if expert and not optimizer:
                    continue  # the first expert rank has them
                first = (stage * layout.expert + expert if optimizer else stage) * layout.tensor
                for number, bucket in enumerate(lay_out(members, bucket_size(args, stage, chunk), alone)):
                    for rank in range(layout.tensor):
                        yield BucketIndex(optimizer, first + rank, chunk, number), parameters, bucket


def tensors(slots: Slots, placement: Placement) -> Iterator[tuple[str, Tensor]]:
    """Canonical tensors, each read from its part of the buckets alone."""
    places = {place.name: place for place in placement.parameters if place.is_parameter}
    names = {name: places[name].parameter for name in list_parameters(placement.config, buffers=False)}

    def whole(name: str) -> Tensor:
        place = places[name]
        ranks = range(placement.layout.tensor)
        return join([_slice(*slots[name][rank], place.shard_numel).reshape(place.shard_shape) for rank in ranks],
                    place.parameter)  # fmt: skip

    yield from canonical(placement.config, names, whole)


def _slice(bucket: Stored, start: int, numel: int) -> Tensor:
    """A part of a vector, of which chunks hold pieces."""
    tensor = torch.empty(numel)
    covered = 0
    for chunk in bucket.chunks:
        first, last = chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]
        if first < start + numel and last > start:
            low, high = max(first, start), min(last, start + numel)
            tensor[low - start : high - start] = chunk.read()[low - first : high - first]
            covered += high - low
    if covered != numel:
        raise MtError(f"a bucket of {bucket.size}", f"lacks elements {start} to {start + numel}", "copy it again")
    return tensor
