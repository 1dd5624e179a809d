"""Canonical tensors to one of Megatron's and back, and the shares that tensor ranks store of it.

Source: docs/specs/checkpoints.md §3.9, §3.10.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mt_ckpt.megatron.parameters.names import list_parameters
from mt_ckpt.megatron.parameters.table import Parameter, Shape
from mt_ckpt.tensor_streams.rotary_pairs import join_pairs, split_pairs
from mt_core.errors import MtError
from mt_models.config import TransformerConfig
from mt_models.qkv_layout import interleave_rows, split_kv, split_qkv

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
            piece = block[max(low - start, 0) : max(high - start, 0)]
            start += len(block)
            if len(piece):
                blocks.append(piece)
        return Rows(tuple(blocks))


FusedTensors = Iterator[tuple[str, Parameter, Rows]]
"""Local name in the whole model, what it is, and the tensor in its logical shape."""


def fuse_stream(config: TransformerConfig, tensors: Iterable[tuple[str, Tensor]], size: int) -> FusedTensors:
    """Megatron's tensors, whole and in their logical shapes, each as soon as its last canonical part has arrived.

    The experts of a layer share their parts, and follow one another; vocabulary rows are padded for `size` ranks.
    """
    names = list_parameters(config)
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, parameter in names.items():
        groups.setdefault(parameter.parts, []).append(name)
    owners = {part: parts for parts in groups for part in parts}
    waiting: dict[tuple[str, ...], dict[str, Tensor]] = {}
    for part, tensor in tensors:
        parts = owners[part]
        waiting.setdefault(parts, {})[part] = tensor
        if len(waiting[parts]) == len(parts):
            arrived = waiting.pop(parts)
            for name in groups[parts]:
                yield name, names[name], fuse(config, [arrived[part] for part in parts], names[name], size)
    assert not waiting, f"incomplete {', '.join(part for arrived in waiting.values() for part in arrived)}"


def fuse(config: TransformerConfig, parts: Sequence[Tensor], parameter: Parameter, size: int) -> Rows:
    """Canonical tensors, whole, as one of Megatron's in its logical shape; vocabulary rows are padded for `size` ranks.

    Source: docs/specs/checkpoints.md §3.10.

    Padding rows are copies of the last row, as Megatron's own converter makes them.
    """
    return _fused(
        config, [part if parameter.expert is None else part[parameter.expert] for part in parts], parameter, size
    )


def _fused(config: TransformerConfig, parts: Sequence[Tensor], parameter: Parameter, size: int) -> Rows:
    if parameter.stacked:
        return Rows(tuple(part[None] for part in parts))
    if len(parts) > 1:
        return Rows(tuple(interleave_rows(parts, config.attention.num_kv_heads)))
    if parameter.parts[0] in VOCABULARY:
        padding = config.vocab_rows(size) - config.vocab_size
        last = parts[0][-1:].expand(padding, *parts[0].shape[1:])
        return Rows((parts[0], last) if padding else (parts[0],))
    return Rows((join_pairs(config, parameter.parts[0], parts[0]),))


def split(config: TransformerConfig, whole: Tensor, parameter: Parameter) -> Mapping[str, Tensor]:
    """Canonical tensors of one of Megatron's, without padding; an expert's share of each. The inverse of `fuse`."""
    if parameter.stacked:
        tensors = [*whole.unbind()]
    elif len(parameter.parts) == 1:
        whole = split_pairs(config, parameter.parts[0], whole)
        tensors = [whole[: config.vocab_size] if parameter.parts[0] in VOCABULARY else whole]
    else:
        fused = whole.unflatten(0, (config.attention.num_kv_heads, -1, config.attention.head_size))
        tensors = split_qkv(fused) if len(parameter.parts) == 3 else split_kv(fused)
    return dict(zip(parameter.parts, tensors, strict=True))


def canonical(
    config: TransformerConfig, names: Mapping[str, Parameter], get: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Canonical tensors from Megatron's, of which `get` returns one in its logical shape.

    Experts are copied into their stack one by one, so `names` has those of a layer in order.
    """
    stacks: dict[str, Tensor] = {}
    for name, parameter in names.items():
        for part, tensor in split(config, get(name), parameter).items():
            if parameter.expert is None:
                yield part, tensor
                continue
            stack = stacks.setdefault(part, tensor.new_empty((_experts(config), *tensor.shape)))
            if stack.dtype != tensor.dtype:
                problem = f"is stored as {tensor.dtype}, the experts before it as {stack.dtype}"
                raise MtError(name, problem.replace("torch.", ""), "store them all alike")
            stack[parameter.expert] = tensor
            if parameter.expert == len(stack) - 1:
                yield part, stacks.pop(part)


def _experts(config: TransformerConfig) -> int:
    assert config.mlp.kind == "moe"
    return config.mlp.experts


def shard(whole: Rows, parameter: Parameter, rank: int, size: int) -> Rows:
    """What tensor rank `rank` of `size` stores of a tensor in its logical shape; it takes no memory of its own."""
    if parameter.cut == 0:
        return whole.part(rank, size)
    blocks = (
        whole.blocks
        if parameter.cut is None
        else tuple(block.chunk(size, parameter.cut)[rank] for block in whole.blocks)
    )
    return Rows(tuple(block.flatten(0, 1) for block in blocks) if parameter.stacked else blocks)


def join(shards: Sequence[Tensor], parameter: Parameter) -> Tensor:
    """The logical tensor from what all tensor ranks store, in order: the inverse of `shard`."""
    pieces = [piece.unflatten(0, (2, -1)) for piece in shards] if parameter.stacked else shards
    return pieces[0] if parameter.cut is None or len(pieces) == 1 else torch.cat([*pieces], parameter.cut)


def stored_shape(config: TransformerConfig, parameter: Parameter, size: int, rows: int | None = None) -> Shape:
    """Shape of one rank's shard; of vocabulary matrices with `rows` in all, where given."""
    if rows and parameter.parts[0] in VOCABULARY:
        return rows // size, *parameter.shapes[0][1:]
    parts = [torch.empty(shape, device="meta") for shape in parameter.shapes]
    return shard(_fused(config, parts, parameter, size), parameter, 0, size).shape
