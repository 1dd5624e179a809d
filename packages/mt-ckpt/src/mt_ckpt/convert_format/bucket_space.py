"""Optimizer tensors that Megatron's main stores by default: flat buckets of each model-parallel rank
(`dp_reshardable`, §2.6), as canonical tensors.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mt_ckpt.convert_format.buckets import bucket_size, lay_out
from mt_ckpt.convert_format.order import named_parameters, tied_across_stages
from mt_ckpt.megatron.dist_metadata import Stored
from mt_ckpt.megatron.fusing import canonical, join, stored_shape
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.names import parameters
from mt_core.errors import MtError, Problem, raise_if
from mt_models.config import GPTConfig

KEY = re.compile(
    r"optimizer\.distributed\.dp_group_idx_(\d+)\.gbuf_idx_(\d+)\.dtype_(.+)\.bucket_idx_(\d+)\.(param|exp_avg|exp_avg_sq)"
)

Slot = tuple[Stored, int]
"""A bucket and where in it a parameter starts."""
Slots = Mapping[str, Mapping[int, Slot]]
"""Name in the whole model → tensor rank → where it lies."""


def slots_of(
    stored: Mapping[str, Stored], key: str, config: GPTConfig, layout: Layout, *, args: Mapping[str, Any]
) -> Slots:
    """Where every parameter lies in the buckets of `key`; `MtError` names all whose size is not as args say."""
    held = {tuple(map(int, (m[1], m[2], m[4]))): one for name, one in stored.items()
            if (m := KEY.fullmatch(name)) and m[5] == key}  # fmt: skip
    found: dict[str, dict[int, Slot]] = {}
    problems: list[Problem] = []
    for (stage, chunk), names in named_parameters(config, layout).items():
        shapes = {
            own: stored_shape(config, one, layout.tensor, args["padded_vocab_size"]) for own, (_, one) in names.items()
        }
        numels = {own: math.prod(shape) for own, shape in shapes.items()}
        buckets = lay_out(numels, bucket_size(args, stage, chunk), tied_across_stages(config, layout))
        for rank in range(layout.tensor):
            for number, bucket in enumerate(buckets):
                at = stage * layout.tensor + rank, chunk, number
                one = held.pop(at, None)
                if one is None or one.size != (bucket.numel,):
                    where = f"bucket {number} of chunk {chunk}, model-parallel rank {at[0]}"
                    told = "is missing" if one is None else f"has {one.size} elements"
                    allowed = f"the parameters that args put there take {bucket.numel}"
                    problems.append(Problem(where, told, allowed))
                    continue
                for own, start in bucket.starts.items():
                    found.setdefault(names[own][0], {})[rank] = one, start
    problems += [Problem(f"bucket {at}", "unexpected", "args describe no such bucket") for at in held]
    raise_if(problems)
    return found


def tensors(slots: Slots, config: GPTConfig, layout: Layout, rows: int) -> Iterator[tuple[str, Tensor]]:
    """Canonical tensors, each read from its part of the buckets alone."""
    names = parameters(config)

    def whole(name: str) -> Tensor:
        shape = stored_shape(config, names[name], layout.tensor, rows)
        shares = [_slice(*slots[name][rank], math.prod(shape)).reshape(shape) for rank in range(layout.tensor)]
        return join(shares, names[name])

    yield from canonical(config, names, whole)


def _slice(bucket: Stored, start: int, numel: int) -> Tensor:
    """A part of a vector, of which chunks hold pieces."""
    found = torch.empty(numel)
    covered = 0
    for chunk in bucket.chunks:
        first, last = chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]
        if first < start + numel and last > start:
            low, high = max(first, start), min(last, start + numel)
            found[low - start : high - start] = chunk.read()[low - first : high - first]
            covered += high - low
    if covered != numel:
        raise MtError(f"a bucket of {bucket.size}", f"lacks elements {start} to {start + numel}", "copy it again")
    return found
