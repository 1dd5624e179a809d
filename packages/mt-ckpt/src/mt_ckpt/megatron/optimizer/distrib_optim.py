"""`distrib_optim.pt`, written: the flat vectors of the distributed optimizers, one bucket for all parameters.

Source: docs/specs/checkpoints.md §1.4.

A vector is filled in a file that is mapped into memory, so that it need not fit there. Data-parallel rank 0 writes, so
the first expert rank has the vectors of what all expert ranks hold, and every one those of its experts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.optimizer.buckets import ALIGNMENT, lay_out, starts_in_file
from mt_ckpt.megatron.optimizer.param_order import by_optimizer, named_parameters, tied_across_stages
from mt_ckpt.megatron.parameters.fusion import stored_shape
from mt_ckpt.megatron.torch_format.streaming_save import TorchWriter
from mt_ckpt.megatron.training_state.rank_shards import StageRank, stream_shards, stream_tensors
from mt_ckpt.megatron.training_state.read_torch import DISTRIBUTED, IN_VECTORS
from mt_ckpt.megatron.training_state.state import TrainingState


@dataclass(frozen=True)
class Vector:
    """The vector of a chunk's parameters that one optimizer has."""

    optimizer: int
    chunk: int
    starts: Mapping[str, int]
    numel: int


def shard_numels(state: TrainingState, layout: Layout) -> dict[StageRank, dict[str, int]]:
    """(stage, chunk) → elements of a rank's share of each parameter, in Megatron's order."""
    numels: dict[StageRank, dict[str, int]] = {}
    for at, names in named_parameters(state.config, layout).items():
        shapes = {own: stored_shape(state.config, one, layout.tensor) for own, (_, one) in names.items()}
        numels[at] = {own: math.prod(shape) for own, shape in shapes.items()}
    return numels


def depends_on_buckets(state: TrainingState, layout: Layout) -> bool:
    """Whether other buckets would put parameters elsewhere: not if each fills whole units of the alignment."""
    return any(numel % ALIGNMENT for numels in shard_numels(state, layout).values() for numel in numels.values())


def lay_out_vectors(state: TrainingState, layout: Layout) -> dict[StageRank, list[Vector]]:
    """Stage and rank → what its file holds."""
    alone = tied_across_stages(state.config, layout.pipeline)
    vectors: dict[StageRank, list[Vector]] = {}
    for (stage, chunk), numels in shard_numels(state, layout).items():
        for number, own in enumerate(by_optimizer(numels, layout.expert)):
            buckets = lay_out(own, alone=alone)
            one = Vector(number, chunk, starts_in_file(buckets), sum(bucket.numel for bucket in buckets))
            for rank in range(layout.tensor * (layout.expert if number else 1)):
                vectors.setdefault((stage, rank), []).append(one)
    return vectors


def write_vectors(folders: Mapping[StageRank, Path], state: TrainingState, layout: Layout) -> None:
    """Write the file of every rank; `folders` are theirs."""
    files = {at: TorchWriter(folder / DISTRIBUTED) for at, folder in folders.items()}
    dtype = next(iter(state.weights()))[1].dtype
    layouts = lay_out_vectors(state, layout)
    written: dict[StageRank, dict[tuple[int, int], dict[str, Tensor | int]]] = {
        at: {(one.optimizer, one.chunk): {"numel_unpadded": one.numel} for one in own} for at, own in layouts.items()
    }
    for kind, key in IN_VECTORS.items():
        mapped: dict[StageRank, dict[tuple[int, int], Tensor]] = {
            at: {
                (one.optimizer, one.chunk): torch.from_file(str(_scratch(folders[at], one)), True, one.numel)
                for one in own
            }
            for at, own in layouts.items()
        }
        for at, chunk, own, share in stream_shards(state, layout, stream_tensors(state, kind, layout)):
            for one in layouts[at]:
                if one.chunk == chunk and own in one.starts:
                    start = one.starts[own]
                    mapped[at][one.optimizer, chunk][start : start + math.prod(share.shape)] = share.tensor().flatten()
        for at, vectors in mapped.items():
            for which, vector in vectors.items():
                written[at][which][key] = files[at].add(vector)
    for at, file in files.items():
        file.close(_contents(written[at], (dtype, torch.float32), 1 if layout.expert == 1 else 2))
        for one in layouts[at]:
            _scratch(folders[at], one).unlink()


def _scratch(folder: Path, one: Vector) -> Path:
    return folder / f"{one.optimizer}.{one.chunk}.vector"


def _contents(written: Mapping[tuple[int, int], Any], kind: Any, optimizers: int) -> Any:
    """Each optimizer's vectors by chunk, None where another rank has them; of one optimizer, no list."""
    parts = [
        {chunk: {kind: vectors} for (own, chunk), vectors in written.items() if own == number}
        for number in range(optimizers)
    ]
    parts = [{"buckets_coalesced": True, **part} if part else None for part in parts]
    return parts if optimizers > 1 else parts[0]
