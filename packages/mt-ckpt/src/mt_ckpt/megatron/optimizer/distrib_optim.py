"""`distrib_optim.pt`, written: the flat vectors of the distributed optimizers, one bucket for all parameters.

Source: docs/specs/checkpoints.md §1.4.

A vector is filled in a file that is mapped into memory, so that it need not fit there. Data-parallel rank 0 writes, so
the first expert rank has the vectors of what all expert ranks hold, and every one those of its experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mt_ckpt.megatron.layout import StageRank
from mt_ckpt.megatron.optimizer import MASTER
from mt_ckpt.megatron.optimizer.buckets import PARAM_ALIGNMENT, lay_out, starts_in_file
from mt_ckpt.megatron.optimizer.param_groups import by_optimizer, tied_across_stages
from mt_ckpt.megatron.placement import Placement, ShardStream, named_parameters
from mt_ckpt.megatron.torch_format.streaming_save import TorchWriter

DISTRIBUTED = "distrib_optim.pt"
IN_VECTORS = {MASTER: "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


@dataclass(frozen=True)
class Vector:
    """The vector of a chunk's parameters that one optimizer has."""

    optimizer: int
    chunk: int
    starts: Mapping[str, int]
    numel: int

    @property
    def key(self) -> tuple[int, int]:
        """Which of a rank's vectors it is."""
        return self.optimizer, self.chunk


def depends_on_buckets(placement: Placement) -> bool:
    """Whether other buckets would put parameters elsewhere: not if each fills whole units of the alignment."""
    return any(place.shard_numel % PARAM_ALIGNMENT for place in placement.parameters)


def lay_out_vectors(placement: Placement) -> dict[StageRank, list[Vector]]:
    """Stage and rank → what its file holds."""
    layout = placement.layout
    alone = tied_across_stages(placement.config, layout.pipeline)
    vectors: dict[StageRank, list[Vector]] = {}
    for (stage, chunk), parameters in named_parameters(placement).items():
        numels = {name: place.shard_numel for name, place in parameters.items()}
        for number, members in enumerate(by_optimizer(numels, layout.expert)):
            buckets = lay_out(members, alone=alone)
            vector = Vector(number, chunk, starts_in_file(buckets), sum(bucket.numel for bucket in buckets))
            for rank in range(layout.tensor * (layout.expert if number else 1)):
                vectors.setdefault((stage, rank), []).append(vector)
    return vectors


def write_vectors(
    folders: Mapping[StageRank, Path],
    placement: Placement,
    stream_kind: Callable[[str], ShardStream],
    dtype: torch.dtype,
) -> None:
    """Write the file of every rank into its folder; `stream_kind` gives the shards of masters and of each moment."""
    files = {at: TorchWriter(folder / DISTRIBUTED) for at, folder in folders.items()}
    vectors = lay_out_vectors(placement)
    written: dict[StageRank, dict[tuple[int, int], dict[str, Tensor | int]]] = {
        at: {vector.key: {"numel_unpadded": vector.numel} for vector in ours} for at, ours in vectors.items()
    }
    for kind, key in IN_VECTORS.items():
        mapped: dict[StageRank, dict[tuple[int, int], Tensor]] = {
            at: {
                vector.key: torch.from_file(str(_scratch_file(folders[at], vector)), True, vector.numel)
                for vector in ours
            }
            for at, ours in vectors.items()
        }
        for at, place, rows in stream_kind(kind):
            for vector in vectors[at]:
                if vector.chunk == place.chunk and place.local_name in vector.starts:
                    start = vector.starts[place.local_name]
                    mapped[at][vector.key][start : start + place.shard_numel] = rows.tensor().flatten()
        for at, filled in mapped.items():
            for which, tensor in filled.items():
                written[at][which][key] = files[at].add(tensor)
    for at, file in files.items():
        file.close(_build_contents(written[at], (dtype, torch.float32), 1 if placement.layout.expert == 1 else 2))
        for vector in vectors[at]:
            _scratch_file(folders[at], vector).unlink()


def _scratch_file(folder: Path, vector: Vector) -> Path:
    return folder / f"{vector.optimizer}.{vector.chunk}.vector"


def _build_contents(written: Mapping[tuple[int, int], Any], dtypes: Any, optimizers: int) -> Any:
    """Each optimizer's vectors by chunk, None where another rank has them; no list if there is one optimizer."""
    by_chunk = [
        {chunk: {dtypes: vectors} for (number, chunk), vectors in written.items() if number == optimizer}
        for optimizer in range(optimizers)
    ]
    parts = [{"buckets_coalesced": True, **part} if part else None for part in by_chunk]
    return parts if optimizers > 1 else parts[0]
