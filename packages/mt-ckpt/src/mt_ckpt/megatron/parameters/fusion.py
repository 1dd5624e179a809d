"""Canonical tensors to one of Megatron's and back, and the shares that tensor ranks store of it.

Source: docs/specs/checkpoints.md §3.9, §3.10.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mt_ckpt.megatron.parameters.table import Parameter, Shape
from mt_core.errors import MtError
from mt_models.config import TransformerConfig

VOCABULARY = ("embed.weight", "head.weight", "head.bias")


@dataclass(frozen=True)
class Rows:
    """A tensor as blocks of its rows, in order. They are views of what it was made of: nothing is copied."""

    blocks: tuple[Tensor, ...]

    @property
    def shape(self) -> Shape:
        """Shape of the whole tensor."""
        first = self.blocks[0]
        return (sum(map(len, self.blocks)), *first.shape[1:]) if first.dim() else ()

    @property
    def dtype(self) -> torch.dtype:
        """Number type of every block."""
        return self.blocks[0].dtype

    def tensor(self) -> Tensor:
        """The whole, copied if there are several blocks."""
        return self.blocks[0] if len(self.blocks) == 1 else torch.cat(self.blocks)

    def part(self, number: int, of: int) -> "Rows":
        """One of several equal parts of the rows."""
        rows = self.shape[0] // of
        low, high, start, blocks = number * rows, (number + 1) * rows, 0, []
        for block in self.blocks:
            own = block[max(low - start, 0) : max(high - start, 0)]
            start += len(block)
            if len(own):
                blocks.append(own)
        return Rows(tuple(blocks))


def fuse(config: TransformerConfig, parts: Sequence[Tensor], one: Parameter, size: int) -> Rows:
    """Canonical tensors, whole, as one in its logical shape; vocabulary rows are padded for `size` ranks.

    Source: docs/specs/checkpoints.md §3.10.

    Padding rows are copies of the last row, as Megatron's own converter makes them.
    """
    return _fused(config, [part if one.expert is None else part[one.expert] for part in parts], one, size)


def _fused(config: TransformerConfig, parts: Sequence[Tensor], one: Parameter, size: int) -> Rows:
    if one.stacked:
        return Rows(tuple(part[None] for part in parts))
    if len(parts) > 1:
        groups = config.attention.num_kv_heads
        return Rows(
            tuple(rows for group in zip(*(part.chunk(groups) for part in parts), strict=True) for rows in group)
        )
    if one.parts[0] in VOCABULARY:
        padding = config.vocab_rows(size) - config.vocab_size
        last = parts[0][-1:].expand(padding, *parts[0].shape[1:])
        return Rows((parts[0], last) if padding else (parts[0],))
    return Rows((parts[0],))


def split(config: TransformerConfig, whole: Tensor, one: Parameter) -> Mapping[str, Tensor]:
    """Canonical tensors of one of Megatron's, without padding; an expert's share of each. The inverse of `fuse`."""
    if one.stacked:
        tensors = [*whole.unbind()]
    elif len(one.parts) == 1:
        tensors = [whole[: config.vocab_size] if one.parts[0] in VOCABULARY else whole]
    else:
        fused = whole.unflatten(0, (config.attention.num_kv_heads, -1, config.attention.head_size))
        counts = [config.attention.queries_per_group, 1, 1][-len(one.parts) :]
        tensors = [part.flatten(0, 2) for part in fused.split(counts, 1)]
    return dict(zip(one.parts, tensors, strict=True))


def canonical(
    config: TransformerConfig, names: Mapping[str, Parameter], get: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Canonical tensors from Megatron's, of which `get` returns one in its logical shape.

    Experts are copied into their stack one by one, so `names` has those of a layer in order.
    """
    stacks: dict[str, Tensor] = {}
    for name, one in names.items():
        for part, tensor in split(config, get(name), one).items():
            if one.expert is None:
                yield part, tensor
                continue
            stack = stacks.setdefault(part, tensor.new_empty((_experts(config), *tensor.shape)))
            if stack.dtype != tensor.dtype:
                problem = f"is stored as {tensor.dtype}, the experts before it as {stack.dtype}"
                raise MtError(name, problem.replace("torch.", ""), "store them all alike")
            stack[one.expert] = tensor
            if one.expert == len(stack) - 1:
                yield part, stacks.pop(part)


def _experts(config: TransformerConfig) -> int:
    assert config.mlp.kind == "moe"
    return config.mlp.experts


def shard(whole: Rows, one: Parameter, rank: int, size: int) -> Rows:
    """What tensor rank `rank` of `size` stores of a tensor in its logical shape; no memory of its own."""
    if one.cut == 0:
        return whole.part(rank, size)
    own = whole.blocks if one.cut is None else tuple(block.chunk(size, one.cut)[rank] for block in whole.blocks)
    return Rows(tuple(block.flatten(0, 1) for block in own) if one.stacked else own)


def join(shards: Sequence[Tensor], one: Parameter) -> Tensor:
    """The logical tensor from what all tensor ranks store, in order: the inverse of `shard`."""
    pieces = [piece.unflatten(0, (2, -1)) for piece in shards] if one.stacked else shards
    return pieces[0] if one.cut is None or len(pieces) == 1 else torch.cat([*pieces], one.cut)


def stored_shape(config: TransformerConfig, one: Parameter, size: int, rows: int | None = None) -> Shape:
    """Shape of one rank's share; of vocabulary matrices with `rows` in all, where given."""
    if rows and one.parts[0] in VOCABULARY:
        return rows // size, *one.shapes[0][1:]
    parts = [torch.empty(shape, device="meta") for shape in one.shapes]
    return shard(_fused(config, parts, one, size), one, 0, size).shape
