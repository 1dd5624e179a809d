"""Megatron's `torch_dist` format, written: which keys, and where under them each tensor lies.

Source: docs/specs/checkpoints.md §2.3 to §2.5.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from mt_ckpt.megatron.args.model_types import model_args
from mt_ckpt.megatron.dist_format.chunks import ChunkLocation
from mt_ckpt.megatron.dist_format.dcp_writer import ChunkFiles
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.parameters.fusion import Rows, shard
from mt_ckpt.megatron.parameters.names import (
    EMBED,
    EXPERT,
    LAYER,
    count_layers,
    parameters,
    second_names,
    strip_layer_index,
    te_name,
)
from mt_ckpt.megatron.parameters.table import Parameter
from mt_ckpt.megatron.torch_format.writer import HEAD_STATE, VERSION
from mt_ckpt.megatron.torch_format.writer import extra_states as of_modules
from mt_models.config import TransformerConfig


def write_dist(
    directory: Path,
    config: TransformerConfig,
    tensors: Iterable[tuple[str, Parameter, Rows]],
    layout: Layout,
    *,
    iteration: int = 0,
) -> None:
    """Write each tensor as it comes: a chunk for each layer, under keys without the layer's number."""
    dtype = torch.float32
    files = ChunkFiles(directory)
    for name, one, whole in tensors:
        dtype = whole.dtype if name == EMBED else dtype
        for own_name in (name, *second_names(config, name)):
            place = chunk_location(config, own_name, engine=layout.engine)
            files.add(place.key, place, shard(whole, one, 0, 1))
    for key in extra_states(config, engine=layout.engine):
        files.add_object(key, None)
    args = model_args(config, layout, dtype=dtype, form="torch_dist")
    common = {"args": args, "checkpoint_version": VERSION, "iteration": iteration}
    files.close({**common, "num_floating_point_operations_so_far": 0})


def chunk_location(config: TransformerConfig, name: str, *, engine: bool) -> ChunkLocation:
    """Where a tensor goes. Names are Transformer Engine's in any case, but for the norm before experts, where its
    layers and Megatron's own differ."""
    layer, expert = LAYER.match(name), EXPERT.search(name)
    if layer is None:
        return ChunkLocation(name)
    index, counts = (int(layer[1]),), (count_layers(config, name),)
    if expert and config.mlp.kind == "moe":
        index, counts = (*index, int(expert[1])), (*counts, config.mlp.experts)
    key = EXPERT.sub("mlp.experts.experts.", strip_layer_index(name))
    return ChunkLocation(te_name(key, experts=engine and config.mlp.kind == "moe"), index, counts)


def extra_states(config: TransformerConfig, *, engine: bool) -> Iterator[str]:
    """Keys of modules' extra states, of which there is one for each layer and expert."""
    te_names = [te_name(name, experts=config.mlp.kind == "moe") for name in parameters(config)]
    names = of_modules(te_names, Layout(1, 1, 1, engine=engine))
    heads = () if config.kind == "gpt" else (HEAD_STATE, *second_names(config, HEAD_STATE))
    for name in (*names, *heads):
        key, at, counts = chunk_location(config, name, engine=engine)
        yield f"{key}/shard_{_dotted(at or (0,))}_{_dotted(counts or (1,))}"


def _dotted(numbers: Iterable[int]) -> str:
    return ".".join(map(str, numbers))
