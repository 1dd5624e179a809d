"""Megatron's `torch` format, written: a file for each tensor and expert rank of each pipeline stage.

Source: docs/specs/checkpoints.md §1.2, §3.2.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mt_ckpt.megatron.args.model_types import as_gpt, model_args
from mt_ckpt.megatron.layout import RANK_FILE, Layout, rank_directory
from mt_ckpt.megatron.parameters.experts import count_experts, grouped_name, to_local_expert_index
from mt_ckpt.megatron.parameters.fusion import Rows, shard
from mt_ckpt.megatron.parameters.names import EMBED, HEAD, LAYER, count_layers, second_names, shift_layer_index, te_name
from mt_ckpt.megatron.parameters.pipeline import layer_locations
from mt_ckpt.megatron.parameters.replicas import Ranks
from mt_ckpt.megatron.parameters.t5_pipeline import spans
from mt_ckpt.megatron.parameters.table import Parameter
from mt_ckpt.megatron.torch_format.streaming_save import TorchWriter
from mt_models.config import TransformerConfig

EMPTY = torch.empty(0, dtype=torch.uint8)
"""What the engine's layers take for no FP8 state."""
LINEAR = re.compile(r"(.*\.(?:linear_qkv|linear_q|linear_kv|linear_proj|linear_fc1|linear_fc2))\.weight\d*")
NORM = re.compile(r"(.*layernorm)\.weight")
"""Norms that no linear layer of the engine's holds; each is a layer of its own there, and has a state."""
HEAD_STATE = "output_layer._extra_state"
ATTENTION = re.compile(r"linear_(?:qkv|q)$")
RELATIVE = "_relative_pos_emb"
"""How the modules of relative biases end."""
VERSION = 3.0
"""checkpoint_version since 2021: query, key and value interleaved by group."""


def as_built(contents: dict[str, Any]) -> dict[str, Any]:
    """Files of Megatron-Core hold what is built below."""
    return contents


def write_rank_files(
    directory: Path,
    config: TransformerConfig,
    tensors: Iterable[tuple[str, Parameter, Rows]],
    layout: Layout,
    *,
    iteration: int = 0,
    finish: Callable[[dict[str, Any]], dict[str, Any]] = as_built,
) -> None:
    """Write each tensor's shares as it comes; `finish` may turn a file's contents into those of another release."""
    at = [(stage, rank) for stage in range(layout.pipeline) for rank in range(layout.tensor * layout.expert)]
    files = {own: TorchWriter(_path(directory, *own, layout)) for own in at}
    states, dtype = _write_shares(files, config, tensors, layout)
    common = {
        "args": model_args(config, layout, dtype=dtype, form="torch"),
        "checkpoint_version": VERSION,
        "iteration": iteration,
        "num_floating_point_operations_so_far": 0,
    }
    for (stage, rank), file in files.items():
        own = states[stage, rank]
        if any(stage == span[-1] for span in spans(config, layout.pipeline, layout.encoder).values()):
            own[-1] |= dict.fromkeys((HEAD_STATE, *second_names(config, HEAD_STATE)))
        for state in own:
            state |= {name: file.add(EMPTY) if layout.engine else None for name in extra_states(state, layout)}
        models = {"model": own[0]} if layout.virtual == 1 else {f"model{c}": s for c, s in enumerate(own)}
        file.close(finish({**common, **models}))


def _write_shares(
    files: Mapping[tuple[int, int], TorchWriter],
    config: TransformerConfig,
    tensors: Iterable[tuple[str, Parameter, Rows]],
    layout: Layout,
) -> tuple[dict[tuple[int, int], list[dict[str, Any]]], torch.dtype]:
    """Write what each rank stores; returns, of each, its chunks' names with what stands for them, and the dtype."""
    ranks = Ranks(layout.tensor, layout.expert, count_experts(config))
    states: dict[tuple[int, int], list[dict[str, Any]]] = {own: [{} for _ in range(layout.virtual)] for own in files}
    dtype = torch.float32
    for name, one, whole in tensors:
        dtype = whole.dtype if name == EMBED else dtype
        for stage, chunk, own_name in locations(config, name, layout):
            for rank in ranks.owners(one):
                own = shard(whole, one, rank % layout.tensor, layout.tensor)
                stored = to_local_expert_index(own_name, ranks.first_expert(rank))
                name_there = written_name(stored, layout, experts=ranks.experts > 0)
                states[stage, rank][chunk][name_there] = files[stage, rank].add(*own.blocks)
    return states, dtype


def _path(directory: Path, stage: int, rank: int, layout: Layout) -> Path:
    expert, tensor = divmod(rank, layout.tensor)
    return directory / rank_directory(tensor, stage, layout.pipeline, expert, layout.expert) / RANK_FILE


def written_name(name: str, layout: Layout, *, experts: bool) -> str:
    """The name that a tensor bears in a file, for its local one."""
    if layout.grouped:
        name = grouped_name(name)
    return te_name(name, experts=experts) if layout.engine else name


def locations(config: TransformerConfig, name: str, layout: Layout) -> Iterator[tuple[int, int, str]]:
    """Stage, chunk and name there, of a tensor; a tied embedding is on the last stage once more, as its head.

    A T5's encoder and decoder, on stages of their own, each begin with embeddings and end with an output layer, though
    the encoder's is of no use, and every stage has the relative biases of both: so Megatron-Core builds them.
    """
    on = spans(config, layout.pipeline, layout.encoder)
    stack, last = name.partition(".")[0], layout.virtual - 1
    names = (name, *second_names(config, name))
    if match := LAYER.match(name):
        own = layer_locations(count_layers(config, name), len(on[stack]), layout.virtual)
        stage, chunk, local = own[int(match[1])]
        yield on[stack][stage], chunk, shift_layer_index(name, local - int(match[1]))
    elif stack in on:
        yield on[stack][-1], last, name
    elif name.startswith("embedding."):
        yield from ((stage, 0, own) for stage in sorted({span[0] for span in on.values()}) for own in names)
        if name == EMBED and as_gpt(config).tied:
            heads = sorted({span[-1] for span in on.values() if len(span) > 1})
            yield from ((stage, last, own) for stage in heads for own in (HEAD, *second_names(config, HEAD)))
    else:
        stages = range(layout.pipeline) if stack.endswith(RELATIVE) else sorted({span[-1] for span in on.values()})
        yield from ((stage, last, own) for stage in stages for own in names)


def extra_states(state: Iterable[str], layout: Layout) -> list[str]:
    """Names of the extra states of linear layers and of all of the engine's: without FP8, None or an empty tensor."""
    modules = dict.fromkeys(match[1] for name in state if (match := LINEAR.fullmatch(name)))
    attention = [ATTENTION.sub("core_attention", module) for module in modules if ATTENTION.search(module)]
    norms = [match[1] for name in state if (match := NORM.fullmatch(name))]
    return [f"{module}._extra_state" for module in (*modules, *((*attention, *norms) if layout.engine else ()))]
