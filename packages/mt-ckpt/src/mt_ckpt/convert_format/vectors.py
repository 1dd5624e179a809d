"""`distrib_optim.pt`, written: the flat vectors of the distributed optimizer, one bucket for all parameters (§1.4).

A vector is filled in a file that is mapped into memory, so that it need not fit there.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mt_ckpt.convert_format.buckets import ALIGNMENT, Bucket, lay_out, starts_in_file
from mt_ckpt.convert_format.order import named_parameters, tied_across_stages
from mt_ckpt.convert_format.read_torch import DISTRIBUTED, IN_VECTORS
from mt_ckpt.convert_format.shares import Place, shares, streamed
from mt_ckpt.convert_format.state import TrainingState
from mt_ckpt.megatron.fusing import stored_shape
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.torch_writer import TorchWriter


def numels_of(state: TrainingState, layout: Layout) -> dict[Place, dict[str, int]]:
    """(stage, chunk) → elements of a rank's share of each parameter, in Megatron's order."""
    found: dict[Place, dict[str, int]] = {}
    for at, names in named_parameters(state.config, layout).items():
        shapes = {own: stored_shape(state.config, one, layout.tensor) for own, (_, one) in names.items()}
        found[at] = {own: math.prod(shape) for own, shape in shapes.items()}
    return found


def depends_on_buckets(state: TrainingState, layout: Layout) -> bool:
    """Whether other buckets would put parameters elsewhere: not if each fills whole units of the alignment."""
    return any(numel % ALIGNMENT for numels in numels_of(state, layout).values() for numel in numels.values())


def layouts(state: TrainingState, layout: Layout) -> dict[Place, list[Bucket]]:
    """(stage, chunk) → its buckets."""
    alone = tied_across_stages(state.config, layout)
    return {at: lay_out(numels, alone=alone) for at, numels in numels_of(state, layout).items()}


def write_vectors(folders: Mapping[Place, Path], state: TrainingState, layout: Layout) -> None:
    """Write the file of every rank; `folders` are theirs by stage and tensor rank."""
    buckets = layouts(state, layout)
    lengths = {at: sum(bucket.numel for bucket in found) for at, found in buckets.items()}
    starts = {at: starts_in_file(found) for at, found in buckets.items()}
    files = {at: TorchWriter(folder / DISTRIBUTED) for at, folder in folders.items()}
    dtype = next(iter(state.weights()))[1].dtype
    held: dict[Place, dict[int, dict[str, Tensor | int]]] = {
        at: {chunk: {"numel_unpadded": lengths[at[0], chunk]} for chunk in range(layout.virtual)} for at in folders
    }
    for kind, key in IN_VECTORS.items():
        mapped = {
            (*at, chunk): torch.from_file(str(folder / f"{chunk}.vector"), True, lengths[at[0], chunk])
            for at, folder in folders.items()
            for chunk in range(layout.virtual)
        }
        for at, chunk, own, share in shares(state, layout, streamed(state, kind, layout)):
            start = starts[at[0], chunk][own]
            mapped[*at, chunk][start : start + math.prod(share.shape)] = share.tensor().flatten()
        for (stage, rank, chunk), vector in mapped.items():
            held[stage, rank][chunk][key] = files[stage, rank].add(vector)
    for at, file in files.items():
        file.close({"buckets_coalesced": True} | {c: {(dtype, torch.float32): v} for c, v in held[at].items()})
        for chunk in range(layout.virtual):
            (folders[at] / f"{chunk}.vector").unlink()
