"""Megatron's `torch_dist` format, written: which keys, and where under them each tensor lies.

Source: docs/specs/checkpoints.md §2.3 to §2.5.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from mt_ckpt.megatron.args.model_types import build_common_state
from mt_ckpt.megatron.dist_format.chunks import ChunkLocation
from mt_ckpt.megatron.dist_format.dcp_writer import ChunkFiles
from mt_ckpt.megatron.extra_states import name_extra_states, name_head_states
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.parameters.fusion import FusedTensors, shard
from mt_ckpt.megatron.parameters.names import (
    EXPERT,
    LAYER,
    WORD_EMBEDDINGS,
    count_layers,
    fuse_norm,
    has_experts,
    list_parameters,
    second_names,
    strip_layer_index,
    te_name,
)
from mt_models.config import TransformerConfig


def write_dist(
    directory: Path, config: TransformerConfig, tensors: FusedTensors, layout: Layout, *, iteration: int = 0
) -> None:
    """Write a checkpoint of a model, each tensor as it arrives."""
    files = ChunkFiles(directory)
    dtype = write_model(files, config, tensors, engine=layout.engine)
    files.close(build_common_state(config, layout, dtype=dtype, form="torch_dist", iteration=iteration))


def write_model(files: ChunkFiles, config: TransformerConfig, tensors: FusedTensors, *, engine: bool) -> torch.dtype:
    """Write a chunk for each layer, under keys without the layer's number, and extra states; returns the dtype."""
    dtype = torch.float32
    for name, parameter, whole in tensors:
        dtype = whole.dtype if name == WORD_EMBEDDINGS else dtype
        for written in (name, *second_names(config, name)):
            location = chunk_location(config, written, engine=engine)
            files.add(location.key, location, shard(whole, parameter, 0, 1))
    for key in extra_state_keys(config, engine=engine):
        files.add_object(key, None)
    return dtype


def chunk_location(config: TransformerConfig, name: str, *, engine: bool) -> ChunkLocation:
    """Where a tensor goes: layers share their keys, unless only some have experts."""
    layer, expert = LAYER.match(name), EXPERT.search(name)
    if layer is None:
        return ChunkLocation(name)
    stacked = config.mlp.kind != "moe" or not config.mlp.dense_layers
    index, counts = ((int(layer[1]),), (count_layers(config, name),)) if stacked else ((), ())
    if expert and config.mlp.kind == "moe":
        index, counts = (*index, int(expert[1])), (*counts, config.mlp.experts)
    key = EXPERT.sub("mlp.experts.experts.", _get_stored_name(config, name, engine=engine))
    return ChunkLocation(strip_layer_index(key) if stacked else key, index, counts)


def _get_stored_name(config: TransformerConfig, name: str, *, engine: bool) -> str:
    """The name of a tensor in the whole model: Megatron's own layers take Transformer Engine's names for norms, those
    before experts too, but none in a model with latent attention (docs/specs/checkpoints.md §2.5)."""
    if engine:
        return te_name(config, name, experts=has_experts(config, name))
    return name if config.attention.kind == "mla" else fuse_norm(config, name)


def extra_state_keys(config: TransformerConfig, *, engine: bool) -> Iterator[str]:
    """Keys of modules' extra states, of which there is one for each layer and expert."""
    te_names = [te_name(config, name, experts=has_experts(config, name)) for name in list_parameters(config)]
    names = name_extra_states(te_names, engine=engine)
    heads = () if config.kind == "gpt" else name_head_states(config)
    for name in (*names, *heads):
        key, at, counts = chunk_location(config, name, engine=engine)
        yield f"{key}/shard_{_dotted(at or (0,))}_{_dotted(counts or (1,))}"


def _dotted(numbers: Iterable[int]) -> str:
    return ".".join(map(str, numbers))
