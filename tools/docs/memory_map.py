"""A map of what ranks have in memory: a small model is built on CPU ranks as `mt train` builds it, and inspected.

`map_memory()` starts the ranks; the functions above it run on each of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn

from mt_cli.run_config import run_config_type
from mt_cli.train.compose import build_state
from mt_core.config.loading import model_config
from mt_core.distributed.mesh import Axis, make_mesh
from mt_core.distributed.topology import resolve_dims
from mt_core.parallel.data.zero1 import Buckets
from mt_core.training.state import TrainState
from mt_core.verification.ranks import run_ranks

RANKS = 4
SAMPLES, LENGTH = 1, 16
MODEL = {
    "kind": "gpt",
    "layers": 2,
    "hidden_size": 64,
    "vocab_size": 240,
    "vocab_divisor": 4,
    "max_seq_len": LENGTH,
    "attention": {"kind": "gqa", "heads": 8, "num_kv_heads": 2, "head_size": 8, "core": "eager"},
    "mlp": {"kind": "gated", "ffn_hidden_size": 192},
    "norm": {"kind": "rms"},
    "position": {"kind": "rope"},
}
"""Small, with two key/value groups, so that four tensor ranks repeat them."""
MODULES = ("attn_norm", "attn.qkv", "attn.out", "mlp_norm", "mlp.gate_up", "mlp.down")
"""Modules of a layer, in the order in which they run."""

DATA: Mapping[str, dict[str, Any]] = {
    "replicate": {"sharding": "replicate"},
    "zero1": {"sharding": "zero1"},
    "fsdp": {"sharding": "fsdp"},
    "zero1 with shard_size 2": {"sharding": "zero1", "shard_size": 2},
}
TENSOR: Mapping[str, dict[str, Any]] = {
    "tensor": {"tensor": RANKS},
    "sequence": {"tensor": RANKS, "sequence": True},
}
EXPERT: dict[str, Any] = {"expert": 2, "sharding": "zero1", "bucket_size": 1}
MIXTURE = {"kind": "moe", "ffn_hidden_size": 48, "experts": 4, "top_k": 2}
"""Feed-forward layers of the model that is built under `EXPERT`."""
BLOCKS = 4
"""Number of equal parts along the first dim in which a tensor is measured; each is an expert where they are stacked."""
MIXED: dict[str, Any] = {"tensor": 2, "sharding": "zero1", "bucket_size": 12_000}


@dataclass(frozen=True, slots=True)
class ElementRange:
    """Elements of a bucket, or of an FSDP unit, that a rank holds of one kind of state."""

    length: int
    """Elements of the whole bucket or unit."""
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class StateShard:
    """One kind of state on a rank; no ranges if it is gathered when needed."""

    name: str
    itemsize: int
    """Bytes of an element, of both moments together."""
    ranges: tuple[ElementRange, ...]

    @property
    def fraction(self) -> float:
        """Return the part of the whole that this rank holds, from 0 to 1."""
        return sum(p.stop - p.start for p in self.ranges) / max(sum(p.length for p in self.ranges), 1)


@dataclass(frozen=True, slots=True)
class ActivationShare:
    """What a rank has at one place of a layer, as fractions of what one rank alone would have."""

    location: str
    tokens: float
    features: float


@dataclass(frozen=True, slots=True)
class BlockShares:
    """How much of each of `BLOCKS` parts of a tensor a rank holds, from 0 to 1."""

    weights: tuple[float, ...]
    masters: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RankMemory:
    """What is in the memory of one rank under every layout."""

    data: dict[str, tuple[StateShard, ...]]
    activations: dict[str, tuple[ActivationShare, ...]]
    written: tuple[str, ...]
    """Tensors of the model part of a checkpoint that this rank writes under `MIXED`."""
    owned: dict[str, int]
    """Canonical tensor → elements of its masters that this rank has under `MIXED`."""
    experts: dict[str, BlockShares]
    """Canonical tensor of a layer → its blocks on this rank, under `EXPERT`."""


def make_config(parallel: Mapping[str, Any], mlp: Mapping[str, Any] | None = None) -> Any:
    """Return the configuration of a run in bf16, so that weights, gradients, masters and moments are four things."""
    return run_config_type().model_validate(
        {
            "model": MODEL | ({"mlp": mlp} if mlp else {}),
            "data": {"kind": "mock", "seq_length": LENGTH},
            "batch": {"micro_batch": SAMPLES, "global_batch": RANKS},
            "precision": {"dtype": "bf16"},
            "parallel": {"bucket_size": 60_000, **parallel},
            "runtime": {"device": "cpu"},
        }
    )


def build_rank_state(
    parallel: Mapping[str, Any], ranks: int = RANKS, mlp: Mapping[str, Any] | None = None
) -> TrainState:
    """Build this rank's state before the first step."""
    config = make_config(parallel, mlp)
    return build_state(config, make_mesh(resolve_dims(config.parallel, ranks)), torch.device("cpu"), resume=False)


def inspect_rank(axis: Axis) -> RankMemory:
    """Build every layout as one of `RANKS` ranks."""
    mixed = build_rank_state(MIXED)
    return RankMemory(
        {name: list_states(build_rank_state(parallel)) for name, parallel in DATA.items()},
        {name: compare_activations(parallel) for name, parallel in TENSOR.items()},
        tuple([name for name, _ in mixed.parts()["model"]]),
        count_owned(mixed),
        measure_blocks(build_rank_state(EXPERT, mlp=MIXTURE)),
    )


def list_states(state: TrainState) -> tuple[StateShard, ...]:
    """List the weights, gradients, masters and moments of this rank."""
    data_parallel = state.data_parallel
    if isinstance(data_parallel, Buckets):
        whole = tuple(ElementRange(b.weights.numel(), 0, b.weights.numel()) for b in data_parallel.buckets)
        sums = tuple(ElementRange(b.weights.numel(), 0, b.gradients.numel()) for b in data_parallel.buckets)
        shard = tuple(ElementRange(b.weights.numel(), b.local.start, b.local.stop) for b in data_parallel.buckets)
        first = data_parallel.buckets[0]
        weights, sum_size = StateShard("weights", first.weights.itemsize, whole), first.gradients.itemsize
    else:
        shard = sums = tuple(list_fsdp_units(state.model, data_parallel.mesh.shard))
        weights, sum_size = StateShard("weights", data_parallel.dtype.itemsize, ()), 4
    wide = next(iter(data_parallel.main_params.values())).itemsize
    return (
        weights,
        StateShard("gradients", sum_size, sums),
        StateShard("masters", wide, shard),
        StateShard("moments", 2 * wide, shard),
    )


def list_fsdp_units(model: nn.Module, shard: Axis) -> list[ElementRange]:
    """List this rank's part of each unit that FSDP2 gathers: a layer, or what lies outside the layers."""
    sizes = [(name.split(".")[1] if name.startswith("layers.") else "", p) for name, p in model.named_parameters()]
    parts = []
    for _, group in groupby(sorted(sizes, key=lambda pair: pair[0]), key=lambda pair: pair[0]):
        tensors: list[Any] = [p for _, p in group]
        length, local = sum(p.numel() for p in tensors), sum(p.to_local().numel() for p in tensors)
        parts.append(ElementRange(length, local * shard.rank, local * (shard.rank + 1)))
    return parts


def compare_activations(parallel: Mapping[str, Any]) -> tuple[ActivationShare, ...]:
    """Compare what a layer's modules take and return on this rank with one rank alone."""
    here, alone = record_shapes(build_rank_state(parallel).model), record_shapes(build_rank_state({}, 1).model)
    return tuple(ActivationShare(key, here[key][1] / alone[key][1], here[key][2] / alone[key][2]) for key in alone)


def record_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Return [B, T, features] before and after each of `MODULES` in a forward pass through the first layer."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in MODULES:

        def note(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            del module
            shapes[f"into {name}"] = tuple(inputs[0].flatten(2).shape)
            shapes[f"out of {name}"] = tuple(output.flatten(2).shape)

        model.layers["0"].get_submodule(name).register_forward_hook(note)
    tokens = torch.zeros(SAMPLES, LENGTH, dtype=torch.int64)
    with torch.no_grad():
        model.token_losses(tokens, tokens)
    return shapes


def count_owned(state: TrainState) -> dict[str, int]:
    """Count the elements of each canonical tensor among this rank's masters, padding rows left out."""
    data_parallel, shapes = state.data_parallel, state.model.config.canonical_shapes()
    owned: dict[str, int] = dict.fromkeys(shapes, 0)
    for name in data_parallel.shapes:
        for marked in state.model.canonical_regions(name):  # one canonical tensor of ones, the others zero
            local = state.model.from_canonical(
                name,
                lambda canonical, marked=marked: torch.full(shapes[canonical], float(canonical == marked)),
                data_parallel.mesh.tensor.rank,
                data_parallel.mesh.tensor.size,
            )
            owned[marked] += int(data_parallel.local_shard(name, local, data_parallel.mesh.shard.rank).sum())
    return owned


def measure_blocks(state: TrainState) -> dict[str, BlockShares]:
    """Measure how much of each tensor of the first layer this rank holds, by parts of its first dim."""
    data_parallel, shapes = state.data_parallel, state.model.config.canonical_shapes()
    blocks: dict[str, BlockShares] = {}
    for name in (name for name in data_parallel.shapes if name.startswith("layers.0.") and "norm" not in name):
        cut = data_parallel.placements[name].axis
        shard, _ = data_parallel.mesh.shard_axes(cut)
        for marked in state.model.canonical_regions(name):  # its parts numbered from 1, other tensors zero
            numbers = torch.arange(1, BLOCKS + 1).repeat_interleave(shapes[marked][0] // BLOCKS).float()
            local = state.model.from_canonical(
                name,
                lambda other, marked=marked, numbers=numbers: (
                    numbers.view(-1, *[1] * (len(shapes[other]) - 1)).expand(shapes[other])
                    if other == marked
                    else torch.zeros(shapes[other])
                ),
                cut.rank,
                cut.size,
            )
            each = torch.Size(shapes[marked]).numel() // BLOCKS
            shares = [
                tuple(float((part == block).sum()) / each for block in range(1, BLOCKS + 1))
                for part in (local, data_parallel.local_shard(name, local, shard.rank))
            ]
            blocks[marked] = BlockShares(*shares)
    return blocks


def map_memory() -> list[RankMemory]:
    """Start `RANKS` ranks and return the memory of each, in their order."""
    return run_ranks(RANKS, inspect_rank)


def get_model_config() -> Any:
    """Return the model's configuration."""
    return model_config(MODEL)
