"""Rotated features of latent attention in pairs of neighbours, as DeepSeek's files have them, and in halves, as we do.

Feature 2i of a head turns with feature 2i + 1 there, feature i with i + L/2 here. Queries and the shared part of keys
are reordered alike, so their products are the same.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mt_models.config import TransformerConfig

QUERIES, KEYS = (".attn.q.weight", ".attn.q_up.weight"), ".attn.kv_down.weight"


def split_pairs(config: TransformerConfig, name: str, tensor: Tensor) -> Tensor:
    """A canonical tensor with rotated features in halves for one in which they stand in pairs; others are kept."""
    return _reorder(config, name, tensor, lambda x: x.unflatten(1, (-1, 2)))


def join_pairs(config: TransformerConfig, name: str, tensor: Tensor) -> Tensor:
    """A canonical tensor with rotated features in pairs: the inverse of `split_pairs`."""
    return _reorder(config, name, tensor, lambda x: x.unflatten(1, (2, -1)))


def _reorder(config: TransformerConfig, name: str, tensor: Tensor, unflatten: Callable[[Tensor], Tensor]) -> Tensor:
    part = config.attention
    if part.kind != "mla" or not name.endswith((*QUERIES, KEYS)):
        return tensor
    heads = tensor.unflatten(0, (-1, len(tensor) if name.endswith(KEYS) else part.head_size))
    plain, rotated = heads.split((heads.shape[1] - part.rope_head_size, part.rope_head_size), 1)
    rotated = unflatten(rotated).transpose(1, 2).flatten(1, 2)
    return torch.cat((plain, rotated), 1).flatten(0, 1)
