"""Megatron's `torch` format, written: a file for each tensor rank of each pipeline stage (§1.2, §3.2)."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mt_ckpt.megatron.arguments import write_args
from mt_ckpt.megatron.layout import RANK_FILE, Layout, layer_places, rank_directory
from mt_ckpt.megatron.names import EMBED, HEAD, LAYER, LINEARS, Parameter, engine_name, shard
from mt_ckpt.megatron.torch_writer import TorchWriter
from mt_models.config import GPTConfig

EMPTY = torch.empty(0, dtype=torch.uint8)
"""What the engine's layers take for no FP8 state."""
VERSION = 3.0
"""checkpoint_version since 2021: query, key and value interleaved by group."""


def write_rank_files(
    directory: Path, config: GPTConfig, tensors: Iterable[tuple[str, Parameter, Tensor]], layout: Layout
) -> None:
    """Write each tensor's shares as it comes."""
    ranks = [(rank, stage) for stage in range(layout.pipeline) for rank in range(layout.tensor)]
    files = {at: TorchWriter(directory / rank_directory(*at, layout.pipeline) / RANK_FILE) for at in ranks}
    states: dict[tuple[int, int], list[dict[str, Any]]] = {at: [{} for _ in range(layout.virtual)] for at in ranks}
    dtype = torch.float32
    for name, one, whole in tensors:
        dtype = whole.dtype if name == EMBED else dtype
        for stage, chunk, own_name in places(config, name, layout):
            for rank in range(layout.tensor):
                placed = files[rank, stage].add(shard(whole, one, rank, layout.tensor))
                states[rank, stage][chunk][engine_name(own_name) if layout.engine else own_name] = placed
    args = write_args(config, layout, dtype=dtype, form="torch")
    for at, file in files.items():
        if at[1] == layout.pipeline - 1:
            states[at][-1]["output_layer._extra_state"] = None
        for state in states[at]:
            state |= {name: file.add(EMPTY) if layout.engine else None for name in extra_states(state)}
        models = {"model": states[at][0]} if layout.virtual == 1 else {f"model{c}": s for c, s in enumerate(states[at])}
        common = {"args": args, "checkpoint_version": VERSION, "iteration": 0}
        file.close({**common, **models, "num_floating_point_operations_so_far": 0})


def places(config: GPTConfig, name: str, layout: Layout) -> Iterator[tuple[int, int, str]]:
    """Stage, chunk and name there, of a tensor; a tied embedding is on the last stage once more, as its head."""
    last = layout.pipeline - 1, layout.virtual - 1
    if found := LAYER.match(name):
        stage, chunk, local = layer_places(config.layers, layout)[int(found[1])]
        yield stage, chunk, f"decoder.layers.{local}.{name[found.end() :]}"
    elif name.startswith("embedding."):
        yield 0, 0, name
        if name == EMBED and config.tied and layout.pipeline > 1:
            yield *last, HEAD
    else:
        yield *last, name


def extra_states(state: Iterable[str]) -> list[str]:
    """Names of the linear layers' extra states: without FP8, None, or an empty tensor of the engine's."""
    modules = [name.removesuffix(".weight") for name in state]
    return [f"{module}._extra_state" for module in modules if module.endswith(LINEARS)]
