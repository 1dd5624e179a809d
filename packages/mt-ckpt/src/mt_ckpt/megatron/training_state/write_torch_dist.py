"""A Megatron-Core checkpoint in `torch_dist` format of a training state.

The optimizer is stored as main's `fully_reshardable`, which any layout loads; as 0.11's `fully_sharded_model_space`,
the only one that 0.11 saves and main refuses; or as an optimizer that is not distributed. Where ranks share
experts, these have an optimizer of their own, which all but the first number in their keys.

Source: docs/specs/checkpoints.md §2.6.
"""

from pathlib import Path
from typing import Any

import torch

from mt_ckpt.megatron.dist_format.chunks import ChunkLocation
from mt_ckpt.megatron.dist_format.dcp_writer import ChunkFiles
from mt_ckpt.megatron.dist_format.writer import chunk_location, extra_states
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.optimizer.param_order import is_expert_parameter
from mt_ckpt.megatron.parameters.fusion import Rows, shard
from mt_ckpt.megatron.parameters.names import second_names
from mt_ckpt.megatron.training_state.rank_shards import get_rng_state, stream_tensors
from mt_ckpt.megatron.training_state.state import KINDS, MASTER, TrainingState
from mt_ckpt.megatron.training_state.write_args import (
    build_args,
    build_common_state,
    build_grad_scaler,
    build_param_groups,
)

RESHARDABLE, MCORE_0_11, PLAIN = "fully_reshardable", "fully_sharded_model_space", "plain"
MASTER_KEYS = {RESHARDABLE: "param", MCORE_0_11: "fp32_param", PLAIN: "fp32_param"}


def write_torch_dist(directory: Path, state: TrainingState, layout: Layout, *, optimizer: str) -> None:
    """Write one iteration with the optimizer in the named layout."""
    files, config = ChunkFiles(directory), state.config
    dtype = torch.float32
    for name, one, whole in stream_tensors(state, "model", layout):
        for key in (name, *second_names(config, name)):
            place = chunk_location(config, key, engine=layout.engine)
            files.add(place.key, place, shard(whole, one, 0, 1))
        dtype = whole.dtype
    for key in extra_states(config, engine=layout.engine):
        files.add_object(key, None)
    for kind in KINDS:
        if kind != MASTER or optimizer != PLAIN or dtype != torch.float32:  # where masters are not the weights
            _add_kind(files, state, layout, kind=kind, optimizer=optimizer)
    if state.random:
        for stage in range(layout.pipeline):
            for rank in range(layout.tensor):
                for value in get_rng_state(state.random, layout, (stage, rank)).values():
                    files.add_object(f"rng_state/shard_{stage}.{rank}_{layout.pipeline}.{layout.tensor}", value)
    args = build_args(state, layout, dtype=dtype, form="torch_dist", distributed=optimizer != PLAIN)
    args.ckpt_fully_parallel_save = optimizer != PLAIN
    files.close({**build_common_state(state, args), **_common(state, layout, optimizer, dtype)})


def _add_kind(files: ChunkFiles, state: TrainingState, layout: Layout, *, kind: str, optimizer: str) -> None:
    numbered = layout.expert > 1 and optimizer != RESHARDABLE
    for name, one, whole in stream_tensors(state, kind, layout):
        prefix = f"optimizer.state.{MASTER_KEYS[optimizer] if kind == MASTER else kind}."
        if numbered:
            prefix = f"chained_{int(is_expert_parameter(name))}.{prefix}"
        for key in (name, *second_names(state.config, name)):
            place = chunk_location(state.config, key, engine=layout.engine)
            if optimizer == MCORE_0_11:
                _add_flat(files, prefix + place.key, place, shard(whole, one, 0, 1), 2 if one.stacked else 1)
            else:
                files.add(prefix + place.key, place, shard(whole, one, 0, 1))


def _add_flat(files: ChunkFiles, key: str, place: ChunkLocation, whole: Rows, halves: int) -> None:
    """Write a tensor as 0.11 stores it on one rank: gate and up are fragments, layers and experts are one each."""
    for number in range(halves):
        others = len(whole.shape) - 1
        at, fragments = (*place.at, number, *[0] * others), (*place.counts, halves, *[1] * others)
        files.add_flat(key, at, fragments, whole.part(number, halves))


def _common(state: TrainingState, layout: Layout, optimizer: str, dtype: torch.dtype) -> dict[str, Any]:
    """Parameter groups, and how the optimizer is stored."""
    groups = build_param_groups(state, layout.expert)
    if optimizer == PLAIN:
        return {"optimizer": _numbered([_plain(state, own, dtype) for own in groups])}
    kind = {"param_state_sharding_type": optimizer, **build_grad_scaler(state)}
    content = {
        "distrib_optim_sharding_type": optimizer,
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
    optimizer_state = {"optimizer": _numbered([{"optimizer": {"param_groups": own}, **kind} for own in groups])}
    return optimizer_state | ({"content_metadata": content} if optimizer == RESHARDABLE else {})


def _plain(state: TrainingState, groups: list[dict[str, Any]], dtype: torch.dtype) -> dict[str, Any]:
    """An optimizer that is not distributed; ids of parameters the newest release adds itself, and refuses in a file."""
    inner = {"state": {"common_step": state.optimizer_steps}, "param_groups": groups}
    return inner if dtype == torch.float32 else {"optimizer": inner, **build_grad_scaler(state)}


def _numbered(optimizers: list[dict[str, Any]]) -> dict[Any, Any]:
    """Several optimizers by number; one as it is."""
    return dict(enumerate(optimizers)) if len(optimizers) > 1 else optimizers[0]
