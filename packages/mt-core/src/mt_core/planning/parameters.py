"""Parameters on one rank, counted from the canonical names and shapes of a model."""

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

from mt_core.distributed.topology import ParallelDims

COLUMN = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")
"""Weight and bias are cut along the outputs."""
ROW = ("attn.out", "mlp.down")
"""The weight is cut along the inputs; the bias is whole."""
VOCABULARY = ("embed", "head")
"""The rows are padded, then cut."""
EXPERTS = ".mlp.experts."
"""In the names of stacks that are cut over the expert axis, and over no other."""
GROUPED = ("attn.k", "attn.v")
"""Has a part for each key/value group; where there are fewer groups than ranks, ranks repeat them."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of elements on one rank."""

    total: int
    block: int
    """Of the largest layer."""
    ends: int
    """Outside the layers: embedding, positions, last norm, output."""
    largest: int
    """Of the largest single parameter."""
    whole: int
    """Not cut over the tensor axis, so that every rank has them."""
    experts: int
    """Of `total`, those of experts, which fewer ranks share."""

    def shared(self, dims: ParallelDims) -> float:
        """Elements of the sharded state on one rank."""
        return (self.total - self.experts) / dims.shard_group_size + self.experts / dims.expert_shard_group_size


@lru_cache(maxsize=128)
def parameters_of(model: Any, tensor: int = 1, expert: int = 1) -> Parameters:
    """Elements of each part of a model on one of `tensor` × `expert` ranks, padding of the vocabulary included."""
    shares = {name: share(model, name, shape, tensor, expert) for name, shape in model.canonical_shapes().items()}
    blocks: dict[str, int] = {}
    for name, elements in shares.items():
        if name.startswith("layers."):
            layer = name.split(".", 2)[1]
            blocks[layer] = blocks.get(layer, 0) + elements
    total = sum(shares.values())
    whole = sum(elements for name, elements in shares.items() if not is_cut(name))
    experts = sum(elements for name, elements in shares.items() if EXPERTS in name)
    ends = total - sum(blocks.values())
    return Parameters(total, max(blocks.values(), default=0), ends, max(shares.values()), whole, experts)


def is_cut(name: str) -> bool:
    """Whether tensor ranks hold different parts of a canonical tensor."""
    module, _, leaf = name.rpartition(".")
    return module.endswith((*COLUMN, *VOCABULARY)) or (module.endswith(ROW) and leaf == "weight")


def share(model: Any, name: str, shape: tuple[int, ...], tensor: int, expert: int = 1) -> int:
    """Elements of a canonical tensor on one of `tensor` × `expert` ranks."""
    module = name.rpartition(".")[0]
    if EXPERTS in name:
        return prod(shape) // expert
    if module.endswith(VOCABULARY):
        unit = model.vocab_divisor * tensor
        return -(-shape[0] // unit) * unit * prod(shape[1:]) // tensor
    if not is_cut(name):
        return prod(shape)
    if module.endswith(GROUPED):
        return prod(shape) // min(tensor, model.attention.num_kv_heads)
    return prod(shape) // tensor


def rank_vocabulary(model: Any, tensor: int) -> int:
    """Rows of the output layer on one rank."""
    return share(model, "embed.weight", (model.vocab_size,), tensor)
