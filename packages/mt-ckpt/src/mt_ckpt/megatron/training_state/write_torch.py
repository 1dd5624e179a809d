"""A Megatron-Core checkpoint in `torch` format of a training state, with the distributed optimizer or without."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mt_ckpt.megatron.layout import RANK_FILE, Layout
from mt_ckpt.megatron.optimizer.distrib_optim import write_vectors
from mt_ckpt.megatron.optimizer.param_groups import assign_groups, with_ids
from mt_ckpt.megatron.optimizer.param_order import by_optimizer, named_parameters
from mt_ckpt.megatron.parameters.experts import count_experts
from mt_ckpt.megatron.parameters.names import second_names
from mt_ckpt.megatron.saver import FusedTensors
from mt_ckpt.megatron.torch_format.streaming_save import TorchWriter
from mt_ckpt.megatron.torch_format.writer import EMPTY, HEAD_STATE, extra_states, written_name
from mt_ckpt.megatron.training_state.rank_shards import (
    StageRank,
    get_rng_state,
    rank_directories,
    stream_shards,
    stream_tensors,
)
from mt_ckpt.megatron.training_state.state import KINDS, MASTER, MOMENTS, TrainingState
from mt_ckpt.megatron.training_state.write_args import (
    build_args,
    build_common_state,
    build_grad_scaler,
    build_param_groups,
)

Placeholders = dict[StageRank, dict[str, Tensor]]
"""Rank → "chunk name" → what stands for a written tensor."""
Order = Sequence[Sequence[str]]
"""Local names of each chunk."""


def write_torch(directory: Path, state: TrainingState, layout: Layout, *, distributed: bool) -> None:
    """Write the files of every rank."""
    folders = {at: directory / name for at, name in rank_directories(layout).items()}
    files = {at: TorchWriter(folder / RANK_FILE) for at, folder in folders.items()}
    weights = _write_shards(files, state, layout, stream_tensors(state, "model", layout))
    kinds = {} if distributed else {
        kind: _write_shards(files, state, layout, stream_tensors(state, kind, layout)) for kind in KINDS
    }  # fmt: skip
    if distributed:
        write_vectors(folders, state, layout)
    dtype = next(iter(weights[0, 0].values())).dtype
    args = build_args(state, layout, dtype=dtype, form="torch", distributed=distributed)
    orders = {at: [*names] for at, names in named_parameters(state.config, layout).items()}
    for at, file in files.items():
        order = [orders[at[0], chunk] for chunk in range(layout.virtual)]
        models = _models(file, state, layout, weights[at], order, last=at[0] == layout.pipeline - 1)
        optimizers = (
            [
                {"optimizer": {"param_groups": groups}, **build_grad_scaler(state)}
                for groups in build_param_groups(state, layout.expert)
            ]
            if distributed
            else _lists(state, layout, {kind: kinds[kind][at] for kind in KINDS}, order, dtype)
        )
        common = {**build_common_state(state, args), **models, **get_rng_state(state.random, layout, at)}
        file.close({**common, "optimizer": optimizers if len(optimizers) > 1 else optimizers[0]})


def _write_shards(
    files: Mapping[StageRank, TorchWriter], state: TrainingState, layout: Layout, tensors: FusedTensors
) -> Placeholders:
    placeholders: Placeholders = {at: {} for at in files}
    for at, chunk, own, share in stream_shards(state, layout, tensors):
        placeholders[at][f"{chunk} {own}"] = files[at].add(*share.blocks)
    return placeholders


def _models(
    file: TorchWriter,
    state: TrainingState,
    layout: Layout,
    placeholders: Mapping[str, Tensor],
    order: Order,
    *,
    last: bool,
) -> dict[str, Any]:
    """The weights of a rank's chunks, in Megatron's order, with the extra states of their linear layers."""
    models: dict[str, Any] = {}
    experts = count_experts(state.config) > 0
    for chunk, names in enumerate(order):
        model: dict[str, Any] = {
            written_name(name, layout, experts=experts): placeholders[f"{chunk} {own}"]
            for own in names
            for name in (own, *second_names(state.config, own))
        }
        if last and chunk == layout.virtual - 1:
            model |= dict.fromkeys((HEAD_STATE, *second_names(state.config, HEAD_STATE)))
        model |= {name: file.add(EMPTY) if layout.engine else None for name in extra_states(model, layout)}
        models["model" if layout.virtual == 1 else f"model{chunk}"] = model
    return models


def _lists(
    state: TrainingState, layout: Layout, kinds: Mapping[str, Mapping[str, Tensor]], order: Order, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """The optimizers as each rank has them whole."""
    labels = [f"{chunk} {own}" for chunk, names in enumerate(order) for own in names]
    masters = by_optimizer({label: kinds[MASTER][label] for label in labels}, layout.expert)
    optimizers: list[dict[str, Any]] = []
    for own, groups in zip(masters, build_param_groups(state, layout.expert), strict=True):
        members = assign_groups({label: master.dim() for label, master in own.items()}, groups)
        states = _states(state, kinds, [label for group in members for label in group])
        inner = {"state": states, "param_groups": with_ids(groups, members)}
        listed = [[own[label] for label in group] for group in members]
        outer = {"optimizer": inner, **build_grad_scaler(state), "fp32_from_fp16_params": listed}
        optimizers.append(inner if dtype == torch.float32 else outer)
    return optimizers


def _states(
    state: TrainingState, kinds: Mapping[str, Mapping[str, Tensor]], order: Sequence[str]
) -> dict[int, dict[str, Tensor]]:
    """Id → moments and steps."""
    steps = torch.tensor(float(state.optimizer_steps))
    return {n: {"step": steps, **{kind: kinds[kind][label] for kind in MOMENTS}} for n, label in enumerate(order)}
