"""A Megatron-Core checkpoint in `torch_dist` format of a training state.

The optimizer is stored as main's `fully_reshardable`, which any layout loads; as 0.11's `fully_sharded_model_space`,
the only one that 0.11 saves and main refuses; or as an optimizer that is not distributed. Where ranks share
experts, these have an optimizer of their own, which all but the first number in their keys.

Source: docs/specs/checkpoints.md §2.6.
"""

from pathlib import Path
from typing import Any

import torch

from mt_ckpt.megatron.dist_format.chunks import Place
from mt_ckpt.megatron.dist_format.dcp_writer import ChunkFiles
from mt_ckpt.megatron.dist_format.writer import extra_states, written_place
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.optimizer.param_order import of_experts
from mt_ckpt.megatron.parameters.fusion import Rows, shard
from mt_ckpt.megatron.parameters.names import copies_of
from mt_ckpt.megatron.training_state.rank_shards import random_of, streamed
from mt_ckpt.megatron.training_state.state import KINDS, MASTER, TrainingState
from mt_ckpt.megatron.training_state.write_args import args_of, common_of, groups_of, scaler_of

RESHARDABLE, OF_0_11, PLAIN = "fully_reshardable", "fully_sharded_model_space", "plain"
MASTER_KEYS = {RESHARDABLE: "param", OF_0_11: "fp32_param", PLAIN: "fp32_param"}


def write_torch_dist(directory: Path, state: TrainingState, layout: Layout, *, optimizer: str) -> None:
    """Write one iteration with the optimizer in the named layout."""
    files, config = ChunkFiles(directory), state.config
    dtype = torch.float32
    for name, one, whole in streamed(state, "model", layout):
        for key in (name, *copies_of(config, name)):
            place = written_place(config, key, engine=layout.engine)
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
                for value in random_of(state.random, layout, (stage, rank)).values():
                    files.add_object(f"rng_state/shard_{stage}.{rank}_{layout.pipeline}.{layout.tensor}", value)
    args = args_of(state, layout, dtype=dtype, form="torch_dist", distributed=optimizer != PLAIN)
    args.ckpt_fully_parallel_save = optimizer != PLAIN
    files.close({**common_of(state, args), **_common(state, layout, optimizer, dtype)})


def _add_kind(files: ChunkFiles, state: TrainingState, layout: Layout, *, kind: str, optimizer: str) -> None:
    numbered = layout.expert > 1 and optimizer != RESHARDABLE
    for name, one, whole in streamed(state, kind, layout):
        prefix = f"optimizer.state.{MASTER_KEYS[optimizer] if kind == MASTER else kind}."
        if numbered:
            prefix = f"chained_{int(of_experts(name))}.{prefix}"
        for key in (name, *copies_of(state.config, name)):
            place = written_place(state.config, key, engine=layout.engine)
            if optimizer == OF_0_11:
                _add_flat(files, prefix + place.key, place, shard(whole, one, 0, 1), 2 if one.stacked else 1)
            else:
                files.add(prefix + place.key, place, shard(whole, one, 0, 1))


def _add_flat(files: ChunkFiles, key: str, place: Place, whole: Rows, halves: int) -> None:
    """As 0.11 stores it on one rank: gate and up are fragments, layers and experts are one each."""
    for number in range(halves):
        others = len(whole.shape) - 1
        at, fragments = (*place.at, number, *[0] * others), (*place.counts, halves, *[1] * others)
        files.add_flat(key, at, fragments, whole.part(number, halves))


def _common(state: TrainingState, layout: Layout, optimizer: str, dtype: torch.dtype) -> dict[str, Any]:
    """Parameter groups, and how the optimizer is stored."""
    groups = groups_of(state, layout.expert)
    if optimizer == PLAIN:
        return {"optimizer": _numbered([_plain(state, own, dtype) for own in groups])}
    kind = {"param_state_sharding_type": optimizer, **scaler_of(state)}
    content = {
        "distrib_optim_sharding_type": optimizer,
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
    found = {"optimizer": _numbered([{"optimizer": {"param_groups": own}, **kind} for own in groups])}
    return found | ({"content_metadata": content} if optimizer == RESHARDABLE else {})


def _plain(state: TrainingState, groups: list[dict[str, Any]], dtype: torch.dtype) -> dict[str, Any]:
    """An optimizer that is not distributed; ids of parameters the newest release adds itself, and refuses in a file."""
    inner = {"state": {"common_step": state.optimizer_steps}, "param_groups": groups}
    return inner if dtype == torch.float32 else {"optimizer": inner, **scaler_of(state)}


def _numbered(optimizers: list[dict[str, Any]]) -> dict[Any, Any]:
    """Several optimizers by number; one as it is."""
    return dict(enumerate(optimizers)) if len(optimizers) > 1 else optimizers[0]
