"""Parameters on one rank, counted from the shapes and cuts of a model's canonical tensors."""

import re
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from mt_core.contracts import TransformerModelConfig
from mt_core.distributed.topology import ParallelDims
from mt_core.parallel.cuts import TensorCut

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
"""What the names of a layer's tensors begin with."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of elements on one rank."""

    total: int
    block: int
    """Elements of the largest layer."""
    ends: int
    """Elements outside the layers: embedding, positions, last norm, output."""
    largest: int
    """Elements of the largest single parameter."""
    whole: int
    """Elements that are not cut over the tensor axis, so that every rank has them."""
    experts: int
    """Elements of experts, which fewer ranks share; they are part of `total`."""

    def shared(self, dims: ParallelDims) -> float:
        """Elements of the sharded state on one rank."""
        return (self.total - self.experts) / dims.shard_group_size + self.experts / dims.expert_shard_group_size


@lru_cache(maxsize=128)
def count_parameters(
    model: TransformerModelConfig, tensor: int = 1, expert: int = 1, expert_tensor: int = 1
) -> Parameters:
    """Elements of each part of a model on one of `tensor` × `expert` ranks, padding of the vocabulary included; each
    expert is shared among `expert_tensor` of the tensor ranks."""
    shapes, cuts = model.canonical_shapes(), model.canonical_cuts()
    elements = {name: count_rank_elements(shape, cuts.get(name), tensor, expert) for name, shape in shapes.items()} | {
        name: count_rank_elements(shape, cuts[name], tensor, expert) // expert_tensor
        for name, shape in shapes.items()
        if name in cuts and cuts[name].inner_dim is not None
    }
    layers: dict[str, int] = {}
    for name, count in elements.items():
        if layer := LAYER.search(name):
            prefix = name[: layer.end()]
            layers[prefix] = layers.get(prefix, 0) + count
    total = sum(elements.values())
    experts = sum(count for name, count in elements.items() if name in cuts and cuts[name].axis == "expert")
    whole = sum(count for name, count in elements.items() if name not in cuts) + (experts if expert_tensor == 1 else 0)
    return Parameters(
        total=total,
        block=max(layers.values(), default=0),
        ends=total - sum(layers.values()),
        largest=max(elements.values(), default=0),
        whole=whole,
        experts=experts,
    )


def count_rank_elements(shape: tuple[int, ...], cut: TensorCut | None, tensor: int, expert: int = 1) -> int:
    """Elements of a canonical tensor on one of `tensor` × `expert` ranks, padding included."""
    if cut is None:
        return prod(shape)
    ranks = expert if cut.axis == "expert" else tensor
    return prod(shape) // shape[cut.dim] * cut.local_length(shape[cut.dim], ranks)


def count_vocab_rows(model: TransformerModelConfig, tensor: int) -> int:
    """Rows of the output layer on one rank, padding included."""
    return model.canonical_cuts()["embed.weight"].local_length(model.vocab_size, tensor)


def find_layer(name: str) -> int | None:
    """The number of the layer that a canonical tensor is part of; None outside the layers."""
    layer = LAYER.search(name)
    return int(layer[1]) if layer else None
