"""Megatron's `torch` format, written: a file for each tensor and expert rank of each pipeline stage.

Source: docs/specs/checkpoints.md §1.2, §3.2.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mt_ckpt.megatron.args.model_types import build_common_state
from mt_ckpt.megatron.extra_states import EMPTY_STATE, name_extra_states, name_head_states
from mt_ckpt.megatron.layout import RANK_FILE, Layout, StageRank, rank_directories
from mt_ckpt.megatron.parameters.fusion import FusedTensors
from mt_ckpt.megatron.parameters.names import WORD_EMBEDDINGS
from mt_ckpt.megatron.parameters.pipeline import stack_stages
from mt_ckpt.megatron.placement import place_parameters, stream_shards
from mt_ckpt.megatron.torch_format.streaming_save import TorchWriter
from mt_models.config import TransformerConfig

States = dict[StageRank, list[dict[str, Any]]]
"""Rank → for each of its chunks, name → what stands for a written tensor."""


def keep_contents(contents: dict[str, Any]) -> dict[str, Any]:
    """Leave a file's contents as they are built here, which is how Megatron-Core has them."""
    return contents


def write_rank_files(
    directory: Path,
    config: TransformerConfig,
    tensors: FusedTensors,
    layout: Layout,
    *,
    iteration: int = 0,
    finish: Callable[[dict[str, Any]], dict[str, Any]] = keep_contents,
) -> None:
    """Write each tensor's shards as it arrives; `finish` may turn a file's contents into those of another release."""
    files = {at: TorchWriter(directory / name / RANK_FILE) for at, name in rank_directories(layout).items()}
    states, dtype = _write_shards(files, config, tensors, layout)
    common = build_common_state(config, layout, dtype=dtype, form="torch", iteration=iteration)
    for at, file in files.items():
        file.close(finish({**common, **finish_models(file, states[at], config, layout, at[0])}))


def _write_shards(
    files: Mapping[StageRank, TorchWriter], config: TransformerConfig, tensors: FusedTensors, layout: Layout
) -> tuple[States, torch.dtype]:
    """Write what each rank stores; returns what stands for it, and the dtype of the word embedding."""
    states: States = {at: [{} for _ in range(layout.virtual)] for at in files}
    dtype = torch.float32
    for at, place, rows in stream_shards(tensors, place_parameters(config, layout)):
        dtype = rows.dtype if place.name == WORD_EMBEDDINGS else dtype
        states[at][place.chunk][place.stored_name] = files[at].add(*rows.blocks)
    return states, dtype


def finish_models(
    file: TorchWriter, chunks: list[dict[str, Any]], config: TransformerConfig, layout: Layout, stage: int
) -> dict[str, Any]:
    """A rank's chunks under the names that its file gives them, with the extra states of their modules."""
    ends = {stages[-1] for stages in stack_stages(config, layout.pipeline, layout.encoder).values()}
    if stage in ends:
        chunks[-1] |= dict.fromkeys(name_head_states(config))
    for model in chunks:
        names = name_extra_states(model, engine=layout.engine)
        model |= {name: file.add(EMPTY_STATE) if layout.engine else None for name in names}
    return (
        {"model": chunks[0]} if len(chunks) == 1 else {f"model{number}": model for number, model in enumerate(chunks)}
    )
