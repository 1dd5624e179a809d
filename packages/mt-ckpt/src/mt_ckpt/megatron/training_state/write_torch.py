"""A Megatron-Core checkpoint in `torch` format of a training state, with the distributed optimizer or without."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mt_ckpt.megatron.layout import RANK_FILE, Layout, StageRank, rank_directories
from mt_ckpt.megatron.optimizer import KINDS, MASTER, MOMENTS
from mt_ckpt.megatron.optimizer.distrib_optim import write_vectors
from mt_ckpt.megatron.optimizer.param_groups import assign_groups, by_optimizer, with_ids
from mt_ckpt.megatron.parameters.names import WORD_EMBEDDINGS
from mt_ckpt.megatron.placement import Placement, place_parameters, select_rank
from mt_ckpt.megatron.torch_format.streaming_save import TorchWriter
from mt_ckpt.megatron.torch_format.writer import finish_models
from mt_ckpt.megatron.training_state.rank_shards import get_rng_state, stream_rank_shards
from mt_ckpt.megatron.training_state.state import TrainingState
from mt_ckpt.megatron.training_state.write_args import (
    build_args,
    build_common_state,
    build_grad_scaler,
    build_param_groups,
)

Placeholders = dict[StageRank, dict[str, Tensor]]
"""Rank → "chunk name" → what stands for a written tensor."""


def write_torch(directory: Path, state: TrainingState, layout: Layout, *, distributed: bool) -> None:
    """Write the files of every rank."""
    placement = place_parameters(state.config, layout)
    folders = {at: directory / name for at, name in rank_directories(layout).items()}
    files = {at: TorchWriter(folder / RANK_FILE) for at, folder in folders.items()}
    weights = _write_shards(files, state, placement, "model")
    dtype = weights[0, 0][f"0 {WORD_EMBEDDINGS}"].dtype
    kinds: dict[str, Placeholders] = {}
    if distributed:
        write_vectors(folders, placement, partial(stream_rank_shards, state, placement), dtype)
    else:
        kinds = {kind: _write_shards(files, state, placement, kind) for kind in KINDS}
    args = build_args(state, layout, dtype=dtype, form="torch", distributed=distributed)
    for at, file in files.items():
        chunks = select_rank(placement, at)
        models = [{place.stored_name: weights[at][place.label] for place in chunk} for chunk in chunks]
        if distributed:
            groups_by_optimizer = build_param_groups(state, layout.expert)
            scaler = build_grad_scaler(state)
            optimizers = [{"optimizer": {"param_groups": groups}, **scaler} for groups in groups_by_optimizer]
        else:
            labels = [place.label for chunk in chunks for place in chunk if place.is_parameter]
            optimizers = _build_optimizers(state, layout, {kind: kinds[kind][at] for kind in KINDS}, labels, dtype)
        contents = {**build_common_state(state, args), **finish_models(file, models, state.config, layout, at[0])}
        contents |= get_rng_state(state.random, layout, at)
        file.close({**contents, "optimizer": optimizers if len(optimizers) > 1 else optimizers[0]})


def _write_shards(
    files: Mapping[StageRank, TorchWriter], state: TrainingState, placement: Placement, kind: str
) -> Placeholders:
    placeholders: Placeholders = {at: {} for at in files}
    for at, place, rows in stream_rank_shards(state, placement, kind):
        placeholders[at][place.label] = files[at].add(*rows.blocks)
    return placeholders


def _build_optimizers(
    state: TrainingState,
    layout: Layout,
    kinds: Mapping[str, Mapping[str, Tensor]],
    labels: Sequence[str],
    dtype: torch.dtype,
) -> list[dict[str, Any]]:
    """The optimizers as each rank has them whole; `labels` are "chunk name" of its parameters in Megatron's order."""
    masters_by_optimizer = by_optimizer({label: kinds[MASTER][label] for label in labels}, layout.expert)
    optimizers: list[dict[str, Any]] = []
    for masters, groups in zip(masters_by_optimizer, build_param_groups(state, layout.expert), strict=True):
        members = assign_groups({label: master.dim() for label, master in masters.items()}, groups)
        states = _build_states(state, kinds, [label for group in members for label in group])
        inner = {"state": states, "param_groups": with_ids(groups, members)}
        listed = [[masters[label] for label in group] for group in members]
        outer = {"optimizer": inner, **build_grad_scaler(state), "fp32_from_fp16_params": listed}
        optimizers.append(inner if dtype == torch.float32 else outer)
    return optimizers


def _build_states(
    state: TrainingState, kinds: Mapping[str, Mapping[str, Tensor]], labels: Sequence[str]
) -> dict[int, dict[str, Tensor]]:
    """Id → moments and steps."""
    steps = torch.tensor(float(state.optimizer_steps))
    return {
        number: {"step": steps, **{kind: kinds[kind][label] for kind in MOMENTS}} for number, label in enumerate(labels)
    }
