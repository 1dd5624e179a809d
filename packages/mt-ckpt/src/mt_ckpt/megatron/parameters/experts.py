"""Experts in `torch` files: every way of Megatron's to store them, put under the names of SequentialMLP.

Source: docs/specs/checkpoints.md §3.6.

    SequentialMLP   mlp.experts.local_experts.3.linear_fc1.weight    a tensor for each expert
    TEGroupedMLP    mlp.experts.linear_fc1.weight3                   the same under other names
    GroupedMLP      mlp.experts.weight1, mlp.experts.weight2         all of a rank's experts in one, transposed

A rank numbers its experts from 0; expert e of E on X ranks is on rank e // (E / X).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mt_ckpt.megatron.parameters.names import EXPERT
from mt_models.config import TransformerConfig

GROUPED = re.compile(r"(.*\.mlp\.experts)\.(linear_fc[12])\.weight(\d+)")
FUSED = re.compile(r"(.*\.mlp\.experts)\.weight([12])")


def count_experts(config: TransformerConfig) -> int:
    """Experts of a layer; 0 if it has none."""
    return config.mlp.experts if config.mlp.kind == "moe" else 0


def unstack_experts(state: Mapping[str, Any], first: int, count: int) -> Iterator[tuple[str, Any]]:
    """What a rank of `count` experts holds, by sequential names; its first expert is number `first` of the model.

    Tensors share memory with the state's. What cannot be taken apart keeps its name, by which it is refused later.
    """
    for name, value in state.items():
        if match := GROUPED.fullmatch(name):
            yield f"{match[1]}.local_experts.{first + int(match[3])}.{match[2]}.weight", value
        elif (match := FUSED.fullmatch(name)) and count and value.shape[2 - int(match[2])] % count == 0:
            for number, matrix in enumerate(_split_fused(value, match[2], count)):
                yield f"{match[1]}.local_experts.{first + number}.linear_fc{match[2]}.weight", matrix
        else:
            yield _shift_expert_index(name, first), value


def _split_fused(tensor: Any, which: str, count: int) -> Iterator[Any]:
    """GroupedMLP's tensor, [h, experts · f] or [experts · f, h], is memory of [experts, in, out]."""
    rows = (count, tensor.shape[0], -1) if which == "1" else (count, -1, tensor.shape[1])
    return (matrix.T for matrix in tensor.reshape(rows).unbind())


def to_local_expert_index(name: str, first: int) -> str:
    """A sequential name with its expert numbered on a rank, whose first expert is number `first` of the model."""
    return _shift_expert_index(name, -first)


def _shift_expert_index(name: str, by: int) -> str:
    return EXPERT.sub(lambda match: f"mlp.experts.local_experts.{int(match[1]) + by}.", name)


def grouped_name(name: str) -> str:
    """TEGroupedMLP's name of an expert's tensor, for the sequential one."""
    return re.sub(r"\.local_experts\.(\d+)\.(linear_fc[12])\.weight$", r".\2.weight\1", name)
