"""Canonical tensors to one of Megatron's and back, and the shares that tensor ranks store of it (§3.9, §3.10)."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mt_ckpt.megatron.tables import Parameter, Shape
from mt_core.errors import MtError
from mt_models.config import TransformerConfig

VOCABULARY = ("embed.weight", "head.weight", "head.bias")


def fuse(config: TransformerConfig, parts: Sequence[Tensor], one: Parameter, size: int) -> Tensor:
    """Canonical tensors, whole, as one in its logical shape; vocabulary rows are padded for `size` ranks (§3.10).

    Padding rows are copies of the last row, as Megatron's own converter makes them.
    """
    return _fused(config, [part if one.expert is None else part[one.expert] for part in parts], one, size)


def _fused(config: TransformerConfig, parts: Sequence[Tensor], one: Parameter, size: int) -> Tensor:
    if one.stacked:
        return torch.stack([*parts])
    if len(parts) > 1:
        groups = (config.attention.kv_groups, -1, config.attention.head_size)
        return torch.cat([part.unflatten(0, groups) for part in parts], 1).flatten(0, 2)
    if one.parts[0] in VOCABULARY:
        padding = config.vocab_rows(size) - config.vocab_size
        last = parts[0][-1:].expand(padding, *parts[0].shape[1:])
        return torch.cat([parts[0], last]) if padding else parts[0]
    return parts[0]


def split(config: TransformerConfig, whole: Tensor, one: Parameter) -> Mapping[str, Tensor]:
    """The reverse: canonical tensors, without padding; of an expert, its share of each."""
    if one.stacked:
        tensors = [*whole.unbind()]
    elif len(one.parts) == 1:
        tensors = [whole[: config.vocab_size] if one.parts[0] in VOCABULARY else whole]
    else:
        fused = whole.unflatten(0, (config.attention.kv_groups, -1, config.attention.head_size))
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
                found = f"is stored as {tensor.dtype}, the experts before it as {stack.dtype}"
                raise MtError(name, found.replace("torch.", ""), "store them all alike")
            stack[one.expert] = tensor
            if one.expert == len(stack) - 1:
                yield part, stacks.pop(part)


def _experts(config: TransformerConfig) -> int:
    assert config.mlp.kind == "moe"
    return config.mlp.experts


def share(whole: Tensor, one: Parameter, rank: int, size: int) -> Tensor:
    """The part of a tensor in its logical shape that tensor rank `rank` of `size` has; no memory of its own."""
    return whole if one.cut is None else whole.chunk(size, one.cut)[rank]


def shard(whole: Tensor, one: Parameter, rank: int, size: int) -> Tensor:
    """The same in the shape in which it is stored."""
    own = share(whole, one, rank, size)
    return own.flatten(0, 1) if one.stacked else own


def join(shards: Sequence[Tensor], one: Parameter) -> Tensor:
    """The reverse: the logical tensor from what all tensor ranks store, in order."""
    pieces = [piece.unflatten(0, (2, -1)) for piece in shards] if one.stacked else shards
    return pieces[0] if one.cut is None or len(pieces) == 1 else torch.cat([*pieces], one.cut)


def stored_shape(config: TransformerConfig, one: Parameter, size: int, rows: int | None = None) -> Shape:
    """Shape of one rank's share; of vocabulary matrices with `rows` in all, where given."""
    if rows and one.parts[0] in VOCABULARY:
        return rows // size, *one.shapes[0][1:]
    parts = [torch.empty(shape, device="meta") for shape in one.shapes]
    return tuple(shard(_fused(config, parts, one, size), one, 0, size).shape)
