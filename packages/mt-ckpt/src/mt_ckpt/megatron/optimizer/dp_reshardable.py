"""Optimizer tensors that Megatron's main stores by default: flat buckets of each model-parallel rank
(`dp_reshardable`, docs/specs/checkpoints.md §2.6), as canonical tensors.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mt_ckpt.megatron.dist_format.metadata import Stored
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.optimizer.buckets import Bucket, bucket_size, lay_out
from mt_ckpt.megatron.optimizer.param_order import by_optimizer, named_parameters, tied_across_stages
from mt_ckpt.megatron.parameters.fusion import canonical, join, stored_shape
from mt_ckpt.megatron.parameters.names import parameters
from mt_core.errors import MtError, Problem, raise_if
from mt_models.config import TransformerConfig

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


def locate_parameters(
    stored: Mapping[str, Stored], key: str, config: TransformerConfig, layout: Layout, *, args: Mapping[str, Any]
) -> Slots:
    """Where every parameter lies in the buckets of `key`; `MtError` names all whose size is not as args say."""
    buckets = {BucketIndex(*(int(m[n] or 0) for n in (1, 2, 3, 5))): one for name, one in stored.items()
            if (m := KEY.fullmatch(name)) and m[6] == key}  # fmt: skip
    slots: dict[str, dict[int, Slot]] = {}
    problems: list[Problem] = []
    for at, names, bucket in _expected(config, layout, args):
        one = buckets.pop(at, None)
        if one is None or one.size != (bucket.numel,):
            problem = "is missing" if one is None else f"has {one.size} elements"
            problems.append(Problem(str(at), problem, f"the parameters that args put there take {bucket.numel}"))
            continue
        for own, start in bucket.starts.items():
            slots.setdefault(names[own], {})[at.group % layout.tensor] = one, start
    problems += [Problem(str(at), "unexpected", "args describe no such bucket") for at in buckets]
    raise_if(problems)
    return slots


def _expected(
    config: TransformerConfig, layout: Layout, args: Mapping[str, Any]
) -> Iterator[tuple[BucketIndex, Mapping[str, str], Bucket]]:
    """Every bucket that the args describe, with the names in the whole model of the local ones."""
    alone = tied_across_stages(config, layout.pipeline)
    for expert in range(layout.expert):
        for (stage, chunk), local_parameters in named_parameters(config, layout, expert).items():
            names = {own: name for own, (name, _) in local_parameters.items()}
            numels = {
                own: math.prod(stored_shape(config, one, layout.tensor, args["padded_vocab_size"]))
                for own, (_, one) in local_parameters.items()
            }
            for optimizer, own in enumerate(by_optimizer(numels, layout.expert)):
                if expert and not optimizer:
                    continue  # the first expert rank has them
                first = (stage * layout.expert + expert if optimizer else stage) * layout.tensor
                for number, bucket in enumerate(lay_out(own, bucket_size(args, stage, chunk), alone)):
                    for rank in range(layout.tensor):
                        yield BucketIndex(optimizer, first + rank, chunk, number), names, bucket


def tensors(slots: Slots, config: TransformerConfig, layout: Layout, rows: int) -> Iterator[tuple[str, Tensor]]:
    """Canonical tensors, each read from its part of the buckets alone."""
    names = parameters(config)

    def whole(name: str) -> Tensor:
        shape = stored_shape(config, names[name], layout.tensor, rows)
        shares = [_slice(*slots[name][rank], math.prod(shape)).reshape(shape) for rank in range(layout.tensor)]
        return join(shares, names[name])

    yield from canonical(config, names, whole)


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
