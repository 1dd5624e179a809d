"""A Megatron-Core checkpoint in `torch` format of a training state, with the distributed optimizer or without."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mt_ckpt.convert_format.groups import group_of
from mt_ckpt.convert_format.megatron_args import args_of, common_of, groups_with_steps, scaler_of
from mt_ckpt.convert_format.order import named_parameters
from mt_ckpt.convert_format.shares import Place, random_of, shares, streamed
from mt_ckpt.convert_format.state import KINDS, MASTER, TrainingState
from mt_ckpt.convert_format.vectors import write_vectors
from mt_ckpt.megatron.layout import RANK_FILE, Layout, rank_directory
from mt_ckpt.megatron.rank_files import EMPTY, extra_states, written_name
from mt_ckpt.megatron.saver import Fused
from mt_ckpt.megatron.torch_writer import TorchWriter

Held = dict[Place, dict[tuple[int, str], Tensor]]
"""Of each rank: (chunk, local name) → what stands for a written tensor."""


def write_torch(directory: Path, state: TrainingState, layout: Layout, *, distributed: bool) -> None:
    """Write the files of every rank."""
    places = [(stage, rank) for stage in range(layout.pipeline) for rank in range(layout.tensor)]
    folders = {(s, r): directory / rank_directory(r, s, layout.pipeline) for s, r in places}
    files = {at: TorchWriter(folder / RANK_FILE) for at, folder in folders.items()}
    weights = _written(files, state, layout, streamed(state, "model", layout))
    kinds = {} if distributed else {
        kind: _written(files, state, layout, streamed(state, kind, layout)) for kind in KINDS
    }  # fmt: skip
    if distributed:
        write_vectors(folders, state, layout)
    dtype = next(iter(weights[0, 0].values())).dtype
    args = args_of(state, layout, dtype=dtype, form="torch", distributed=distributed)
    for at, file in files.items():
        models = _models(file, state, layout, weights[at], stage=at[0])
        optimizer = (
            {"optimizer": {"param_groups": groups_with_steps(state)}, **scaler_of(state)}
            if distributed
            else _lists(state, layout, {kind: kinds[kind][at] for kind in KINDS}, dtype, at[0])
        )
        file.close({**common_of(state, args), **models, "optimizer": optimizer, **random_of(state.random, layout, at)})


def _written(files: Mapping[Place, TorchWriter], state: TrainingState, layout: Layout, tensors: Fused) -> Held:
    held: Held = {at: {} for at in files}
    for at, chunk, own, share in shares(state, layout, tensors):
        held[at][chunk, own] = files[at].add(*share.blocks)
    return held


def _models(
    file: TorchWriter, state: TrainingState, layout: Layout, held: Mapping[tuple[int, str], Tensor], *, stage: int
) -> dict[str, Any]:
    """The weights of a rank's chunks, in Megatron's order, with the extra states of their linear layers."""
    models: dict[str, Any] = {}
    for chunk in range(layout.virtual):
        names = named_parameters(state.config, layout)[stage, chunk]
        model: dict[str, Any] = {written_name(own, layout, experts=False): held[chunk, own] for own in names}
        if (stage, chunk) == (layout.pipeline - 1, layout.virtual - 1):
            model["output_layer._extra_state"] = None
        model |= {name: file.add(EMPTY) if layout.engine else None for name in extra_states(model, layout)}
        models["model" if layout.virtual == 1 else f"model{chunk}"] = model
    return models


def _lists(
    state: TrainingState, layout: Layout, kinds: Mapping[str, Mapping[tuple[int, str], Tensor]], dtype: Any, stage: int
) -> dict[str, Any]:
    """The optimizer as each rank has it whole: ids count through the groups (§1.4)."""
    groups: list[list[tuple[int, str]]] = [[] for _ in state.groups]
    for chunk in range(layout.virtual):
        for own in named_parameters(state.config, layout)[stage, chunk]:
            groups[group_of(own, kinds[MASTER][chunk, own].dim(), state.groups)].append((chunk, own))
    order = [at for group in groups for at in group]
    ids = {at: number for number, at in enumerate(order)}
    steps = torch.tensor(float(state.optimizer_steps))
    states = {ids[at]: {"step": steps, **{k: kinds[k][at] for k in KINDS if k != MASTER}} for at in order}
    settings = [
        {**values, "params": [ids[at] for at in group]}
        for values, group in zip(groups_with_steps(state), groups, strict=True)
    ]
    inner = {"state": states, "param_groups": settings}
    if dtype == torch.float32:
        return inner
    masters = [[kinds[MASTER][at] for at in group] for group in groups]
    return {"optimizer": inner, **scaler_of(state), "fp32_from_fp16_params": masters}
