"""A model whose layers compute exactly by themselves, so that torch's functions need not be watched in them.

To watch every function of torch's, as `BatchInvariance` does, takes a third of a step of a small model. Most models'
layers call few that it changes, in places that are known: products, activations and the angles of positions. These have
replacements while `ExactLayers` is entered; a model that has other such functions is watched as a whole.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch.nn.functional as F
from torch import nn

from mt_eval.generation.exact.batch_invariance import BatchInvariance
from mt_models.layers.attention import Attention
from mt_models.layers.basic import CrossEntropy, Embedding, LayerNorm, Linear, RMSNorm
from mt_models.layers.dropout import AttentionDropout, HiddenDropout
from mt_models.layers.mlp import Dense, Gated
from mt_models.models.gpt import GPT, Block

KNOWN = (Attention, Block, CrossEntropy, Dense, Embedding, Gated, GPT, LayerNorm, Linear, RMSNorm)
"""Layers that are exact once their products, activations and angles are."""
IDLE = (AttentionDropout, HiddenDropout, nn.Identity, nn.ModuleDict)
"""Modules that compute nothing in generation."""


def make_exact(model: GPT, arithmetic: BatchInvariance) -> AbstractContextManager[object]:
    """What a pass through a model's layers is to be entered in."""
    part, modules = model.config.attention, [*model.modules()]
    known = all(type(module) in (*KNOWN, *IDLE) for module in modules)
    plain = all(module.op is F.linear for module in modules if isinstance(module, Linear))
    capped = part.kind != "gqa" or part.softcap is not None
    return ExactLayers(model, arithmetic) if known and plain and not capped else arithmetic


class ExactLayers:
    """Replaces, as long as it is entered, what layers call by what computes each row as if it were alone."""

    def __init__(self, model: GPT, arithmetic: BatchInvariance) -> None:
        self._places: list[tuple[dict[str, Any], str, Any]] = [
            (vars(model), "rotation", arithmetic.watch(model.rotation))
        ]
        for module in model.modules():
            if isinstance(module, Linear):
                self._places.append((vars(module), "op", arithmetic.multiply))
            elif isinstance(module, Dense | Gated):
                self._places.append((vars(module), "activation", arithmetic.watch(module.activation)))
        self._before: list[Any] = []

    def __enter__(self) -> None:
        self._before = [attributes.get(name) for attributes, name, _ in self._places]
        for attributes, name, exact in self._places:
            attributes[name] = exact

    def __exit__(self, *_: object) -> None:
        for (attributes, name, _), before in zip(self._places, self._before, strict=True):
            if before is None:
                del attributes[name]  # a method of the class is there again
            else:
                attributes[name] = before
