"""How layers fuse canonical tensors: each layer that does has `fusions`, a table by the names of its parameters.

A parameter in no table is one canonical tensor of the same name and shape. Layers need not know of padding and of the
slices of ranks: `canonical.py` adds them, from the configuration's cuts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mt_models.config.tensors import FusedModule


@dataclass(frozen=True, slots=True)
class Fusion:
    """How one parameter, or a rank's part of it, is made of canonical tensors, or the same rank's parts of those."""

    parts: tuple[str, ...] | None = None
    """The modules that have the canonical tensors, siblings of the parameter's own; None for a module of its name.

    They are those of the configuration's `FusedModule`, so that rules know them without torch.
    """
    split: Callable[[Tensor], Sequence[Tensor]] = lambda fused: (fused,)
    """From the parameter's tensor to the canonical ones, which may share its memory."""
    fuse: Callable[[Sequence[Tensor]], Tensor] = lambda parts: parts[0]
    """The inverse of `split`."""


PLAIN = Fusion()


def stack_parts(module: FusedModule, dim: int = 0) -> Fusion:
    """The fusion of a module of equal parts, such as gate and up, in a dim of their own."""
    return Fusion(module.parts, lambda fused: fused.unbind(dim), lambda tensors: torch.stack([*tensors], dim=dim))


def get_fusion(module: nn.Module, name: str) -> Fusion:
    """The fusion of the parameter called `name` in a module, from the innermost layer that has it in its table."""
    child, _, rest = name.partition(".")
    inner = get_fusion(getattr(module, child), rest) if rest else PLAIN
    return inner if inner is not PLAIN else getattr(module, "fusions", {}).get(name, PLAIN)
