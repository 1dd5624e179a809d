"""Tensors that a family stores fused, transposed or packed, taken apart into those that its table of names knows.

Nothing is copied on the way in; on the way out the parts of a fused tensor are held back until all are there.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mt_ckpt.huggingface.families.family import Family

PACKED = {"experts.gate_up_proj": ("gate_proj", "up_proj"), "experts.down_proj": ("down_proj",)}
"""[E, out, in] as transformers 5 holds experts in memory, and the projections of one expert in it."""


def unpack(
    family: Family, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Stored tensors as single projections [out, in]; `shapes` are the model's, by canonical name."""
    for name, tensor in tensors:
        module, _, leaf = name.rpartition(".")
        if tensor.dim() == 2 and module.endswith(family.transposed):
            tensor = tensor.t()
        if parts := _parts(family, module):
            names = [f"{part}.{leaf}" for part in parts]
            rows = [shapes.get(family.names.ours(part) or "", (0,))[0] for part in names]
            yield from zip(names, _split(tensor, rows), strict=True)
        elif tensor.dim() == 3 and name.endswith(tuple(PACKED)):
            yield from _experts(name, tensor)
        else:
            yield name, tensor


def pack(family: Family, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Single projections fused and transposed as the family stores them.

    Experts stay apart, which every release of transformers reads.
    """
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        module, _, leaf = name.rpartition(".")
        fused = _fused(family, module)
        if fused:
            pieces = waiting.setdefault(f"{fused}.{leaf}", {})
            pieces[module] = tensor
            parts = _parts(family, fused)
            if len(pieces) < len(parts):
                continue
            del waiting[f"{fused}.{leaf}"]
            module, name = fused, f"{fused}.{leaf}"
            tensor = torch.cat([pieces[part] for part in parts])
        yield name, tensor.t() if tensor.dim() == 2 and module.endswith(family.transposed) else tensor
    assert not waiting, f"incomplete {', '.join(waiting)}"


def _parts(family: Family, module: str) -> list[str]:
    """The modules that a fused one consists of; empty if it is not fused."""
    for fused, parts in family.fused.items():
        if module.endswith(f".{fused}"):
            return [module.removesuffix(fused) + part for part in parts]
    return []


def _fused(family: Family, module: str) -> str:
    """The fused module that a module is a part of; empty if it is none."""
    for fused, parts in family.fused.items():
        for part in parts:
            if module.endswith(f".{part}"):
                return module.removesuffix(part) + fused
    return ""


def _split(tensor: Tensor, rows: Sequence[int]) -> Sequence[Tensor]:
    """Pieces of so many rows each; the last one shows what is too much or too little."""
    edges = [sum(rows[:count]) for count in range(1, len(rows))]
    return tensor.tensor_split(edges) if tensor.dim() else [tensor] * len(rows)


def _experts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    stem, _, packed = name.rpartition("experts.")
    parts = PACKED[f"experts.{packed}"]
    for number, matrix in enumerate(tensor):
        for part, piece in zip(parts, matrix.tensor_split(len(parts)), strict=True):
            yield f"{stem}experts.{number}.{part}.weight", piece
