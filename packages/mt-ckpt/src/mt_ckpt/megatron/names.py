"""Megatron-Core's names of GPT's tensors, what canonical tensors each is made of, and how tensor ranks cut it (§3)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mt_models.config import GPTConfig

EMBED, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
IGNORED = re.compile(r"(_extra_state|rotary_pos_emb\.inv_freq)$")
"""State of FP8 kernels, None or empty otherwise, and a buffer of old releases."""
TE = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Names that Transformer Engine's layers give, and `torch_dist` files always, to the local ones."""
LINEARS = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")


@dataclass(frozen=True)
class Parameter:
    """A tensor of Megatron's. Logical shape: as canonical; q, k, v interleaved; gate and up stacked."""

    parts: tuple[str, ...]
    cut: int | None = None
    """The dim, of the logical shape, that tensor ranks cut."""


BLOCK = {
    "input_layernorm": Parameter(("attn_norm",)),
    "self_attention.linear_qkv": Parameter(("attn.q", "attn.k", "attn.v"), 0),
    "self_attention.linear_proj": Parameter(("attn.out",), 1),
    "pre_mlp_layernorm": Parameter(("mlp_norm",)),
    "mlp.linear_fc1": Parameter(("mlp.gate", "mlp.up"), 1),
    "mlp.linear_fc2": Parameter(("mlp.down",), 1),
}


def parameters(config: GPTConfig) -> dict[str, Parameter]:
    """Every tensor of the model under its local name, with the layer's number in the whole model."""
    found = {
        EMBED: Parameter(("embed.weight",), 0),
        "embedding.position_embeddings.weight": Parameter(("position.weight",)),
    }
    for n in range(config.layers):
        for module, one in BLOCK.items():
            for leaf in ("weight", "bias"):
                found[f"decoder.layers.{n}.{module}.{leaf}"] = _of_layer(config, f"layers.{n}.", leaf, one)
    found |= {f"decoder.final_layernorm.{leaf}": Parameter((f"norm.{leaf}",)) for leaf in ("weight", "bias")}
    found[HEAD] = Parameter(("head.weight",), 0)
    shapes = config.canonical_shapes()
    return {name: one for name, one in found.items() if all(part in shapes for part in one.parts)}


def _of_layer(config: GPTConfig, prefix: str, leaf: str, one: Parameter) -> Parameter:
    parts, cut = one.parts, one.cut
    if parts == ("mlp.gate", "mlp.up") and config.mlp.kind == "dense":
        parts, cut = ("mlp.up",), 0
    if leaf == "bias" and len(parts) == 1 and cut == 1:
        cut = None  # rows of the product are summed over ranks, then the bias is added once
    return Parameter(tuple(f"{prefix}{part}.{leaf}" for part in parts), cut)


def local_name(name: str) -> str:
    """The local name of a tensor for its local or Transformer Engine's name."""
    for theirs, local in TE.items():
        name = name.replace(theirs, local)
    return name


def engine_name(name: str) -> str:
    """Transformer Engine's name of a tensor for its local name."""
    for theirs, local in TE.items():
        name = name.replace(f".{local}", f".{theirs}")
    return name


def fuse(config: GPTConfig, parts: Sequence[Tensor], one: Parameter, size: int) -> Tensor:
    """Canonical tensors as one in its logical shape; vocabulary rows are padded for `size` ranks (§3.10).

    Padding rows are copies of the last row, as Megatron's own converter makes them.
    """
    if len(parts) == 3:
        groups = (config.attention.kv_groups, -1, config.attention.head_size)
        return torch.cat([part.unflatten(0, groups) for part in parts], 1).flatten(0, 2)
    if len(parts) == 2:
        return torch.stack([*parts])
    if one.parts[0] in ("embed.weight", "head.weight"):
        return torch.cat([parts[0], parts[0][-1:].expand(config.vocab_rows(size) - config.vocab_size, -1)])
    return parts[0]


def split(config: GPTConfig, whole: Tensor, one: Parameter) -> Mapping[str, Tensor]:
    """The reverse: canonical tensors, without padding."""
    if len(one.parts) == 3:
        fused = whole.unflatten(0, (config.attention.kv_groups, -1, config.attention.head_size))
        tensors = [part.flatten(0, 2) for part in fused.split([config.queries_per_group, 1, 1], 1)]
    elif len(one.parts) == 2:
        tensors = [*whole.unbind()]
    else:
        tensors = [whole[: config.vocab_size] if one.parts[0] in ("embed.weight", "head.weight") else whole]
    return dict(zip(one.parts, tensors, strict=True))


def shard(whole: Tensor, one: Parameter, rank: int, size: int) -> Tensor:
    """What tensor rank `rank` of `size` stores of a tensor in its logical shape."""
    own = whole if one.cut is None else whole.chunk(size, one.cut)[rank]
    return own.flatten(0, 1) if len(one.parts) == 2 else own


def join(shards: Sequence[Tensor], one: Parameter) -> Tensor:
    """The reverse: the logical tensor from what all tensor ranks store, in order."""
    pieces = [piece.unflatten(0, (2, -1)) for piece in shards] if len(one.parts) == 2 else shards
    return pieces[0] if one.cut is None or len(pieces) == 1 else torch.cat([*pieces], one.cut)


def stored_shape(config: GPTConfig, one: Parameter, size: int, rows: int | None = None) -> tuple[int, ...]:
    """Shape of one rank's share; of vocabulary matrices with `rows` in all, where given."""
    shapes = config.canonical_shapes()
    if rows and one.parts[0] in ("embed.weight", "head.weight"):
        return rows // size, config.model_size
    parts = [torch.empty(shapes[part], device="meta") for part in one.parts]
    return tuple(shard(fuse(config, parts, one, size), one, 0, size).shape)
