"""Extra states of Megatron's modules: without FP8, None or an empty tensor under a name ending in `_extra_state`.

Source: docs/specs/checkpoints.md §2.7 and §3.2.
"""

import re
from collections.abc import Iterable

import torch

from mt_ckpt.megatron.parameters.names import second_names
from mt_models.config import TransformerConfig

EMPTY_STATE = torch.empty(0, dtype=torch.uint8)
"""What Transformer Engine's layers take for no FP8 state."""
LINEAR = re.compile(r"(.*\.linear_\w+)\.weight\d*")
NORM = re.compile(r"(.*layernorm)\.weight")
"""Norms that no linear layer of the engine's holds; each is a layer of its own there, and has a state."""
ATTENTION = re.compile(r"linear_(?:qkv|q|kv_up_proj)$")
HEAD_STATE = "output_layer._extra_state"


def name_extra_states(names: Iterable[str], *, engine: bool) -> list[str]:
    """Names of the extra states of the linear layers, and of Transformer Engine's other layers, that have tensors."""
    names = [*names]
    modules = dict.fromkeys(match[1] for name in names if (match := LINEAR.fullmatch(name)))
    attention = [ATTENTION.sub("core_attention", module) for module in modules if ATTENTION.search(module)]
    norms = [match[1] for name in names if (match := NORM.fullmatch(name))]
    return [f"{module}._extra_state" for module in (*modules, *((*attention, *norms) if engine else ()))]


def name_head_states(config: TransformerConfig) -> list[str]:
    """Names of the output layer's extra state, which is None in any case."""
    return [HEAD_STATE, *second_names(config, HEAD_STATE)]
