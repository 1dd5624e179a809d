"""Where a `torch_dist` checkpoint holds a tensor, and reading it from the chunks that overlap it.

Source: docs/specs/checkpoints.md §2.4, §2.5.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from mt_ckpt.megatron.dist_format.metadata import Chunk, Stored
from mt_ckpt.megatron.parameters.names import EXPERT, LAYER, count_layers, fuse_norm, strip_layer_index
from mt_ckpt.megatron.parameters.table import Shape
from mt_models.config import TransformerConfig

GATED = (".linear_fc1.weight", ".linear_fc1.bias")
"""Ends of the keys of tensors that are gate and up."""


class ChunkLocation(NamedTuple):
    """A tensor in one that is stacked over layers, experts, or both."""

    key: str
    at: Shape = ()
    """The layer, the expert."""
    counts: Shape = ()
    """How many of each the key holds."""


def candidate_locations(config: TransformerConfig, name: str) -> list[ChunkLocation]:
    """Where releases put a tensor, the usual place first: layers under one key, or under one for each, experts too."""
    layer, expert = LAYER.match(name), EXPERT.search(name)
    of_expert = (int(expert[1]),) if expert else ()
    experts = (config.mlp.experts,) if expert and config.mlp.kind == "moe" else ()
    together = EXPERT.sub("mlp.experts.experts.", name)
    if layer is None:
        return [ChunkLocation(name)]
    known = dict.fromkeys((fuse_norm(config, together), together))
    stacked = [strip_layer_index(key) for key in known]
    return [
        *(ChunkLocation(key, (int(layer[1]), *of_expert), (count_layers(config, name), *experts)) for key in stacked),
        *([ChunkLocation(EXPERT.sub(r"mlp.experts.experts.\1.", name))] if expert else []),
        *(ChunkLocation(key, of_expert, experts) for key in known),
    ]


def join_gate_and_up(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors with gate and up under one key, gate's rows first, where a file has them under `_w` and `_v`.

    Megatron saves so with `singleton_local_shards`, each layer and expert under a key of its own.
    """
    joined = dict(stored)
    for key in stored:
        stem = key.removesuffix("_w")
        gate, up = stored[key], stored.get(f"{stem}_v")
        if stem == key or not stem.endswith(GATED) or stem in stored or not (up and gate.size and up.size):
            continue
        if gate.size == up.size and gate.original is up.original is None:
            rows = gate.size[0]
            below = [replace(c, offsets=(c.offsets[0] + rows, *c.offsets[1:])) for c in up.chunks]
            joined[stem] = Stored((2 * rows, *gate.size[1:]), [*gate.chunks, *below])
            del joined[key], joined[f"{stem}_v"]
    return joined


class ChunkReader:
    """Reads tensors; holds the last chunk that it read, which may have the next one too."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self.stored = stored
        self.key = ""
        self.chunks: dict[Shape, list[Chunk]] = {}
        self.last: tuple[Chunk | None, Tensor] = None, torch.empty(0)

    def read(self, place: ChunkLocation) -> Tensor:
        """The tensor, put together from its chunks."""
        depth, whole = len(place.at), None
        size = (self.stored[place.key].size or ())[depth:]
        for chunk in self._overlapping(place):
            if self.last[0] != chunk:
                self.last = None, torch.empty(0)  # before the next is read
                self.last = chunk, chunk.read()
            part = self.last[1][tuple(n - start for n, start in zip(place.at, chunk.offsets, strict=False))]
            if part.shape == size:
                return part
            if whole is None:
                whole = torch.empty(size, dtype=part.dtype)
            whole[tuple(map(_slice, chunk.offsets[depth:], part.shape))] = part
        assert whole is not None, place
        return whole

    def _overlapping(self, place: ChunkLocation) -> list[Chunk]:
        """The chunks with a part of a tensor; those of a key are sorted once."""
        if self.key != place.key:
            self.key, self.chunks = place.key, {}
            depth = len(place.at)
            for chunk in self.stored[place.key].chunks:
                spans = (range(start, start + length) for start, length in zip(chunk.offsets, chunk.sizes, strict=True))
                for index in product(*list(spans)[:depth]):
                    self.chunks.setdefault(index, []).append(chunk)
        return self.chunks[place.at]


def _slice(start: int, length: int) -> slice:
    return slice(start, start + length)
