"""Where every parameter of a model goes: which ranks store a shard of it, in which order and under which name.

The list is computed once, before anything is written. The writers of `torch` files and the flat vectors of distributed
optimizers both follow it, since vectors and ids of parameters count in the order of Megatron's named_parameters().
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from mt_ckpt.megatron.layout import Layout, StageRank
from mt_ckpt.megatron.parameters.experts import count_experts, grouped_name, to_local_expert_index
from mt_ckpt.megatron.parameters.fusion import FusedTensors, Rows, shard, stored_shape
from mt_ckpt.megatron.parameters.names import (
    LAYER,
    OUTPUT_LAYER,
    WORD_EMBEDDINGS,
    count_layers,
    has_experts,
    list_parameters,
    second_names,
    shift_layer_index,
    te_name,
)
from mt_ckpt.megatron.parameters.order import sort_key
from mt_ckpt.megatron.parameters.pipeline import layer_locations, stack_stages
from mt_ckpt.megatron.parameters.replicas import Ranks
from mt_ckpt.megatron.parameters.table import (
    DOWN_PROJECTIONS,
    Parameter,
    Shape,
    has_output,
    is_buffer,
    is_tied,
)
from mt_models.config import TransformerConfig

RELATIVE = "_relative_pos_emb"
"""How the modules of relative biases end."""


@dataclass(frozen=True)
class PlacedParameter:
    """A parameter in a chunk of a pipeline stage, and the ranks there that store its shards."""

    name: str
    """Local name in the whole model."""
    parameter: Parameter
    stage: int
    chunk: int
    local_name: str
    """Name in the chunk: layers count from the chunk's first, experts from the rank's first."""
    stored_name: str
    """Name in a `torch` file, which may be Transformer Engine's."""
    ranks: range
    """Ranks of the stage that have a shard: expert rank · tensor ranks + tensor rank."""
    shard_shape: Shape
    copy_of: str | None = None
    """Local name of the parameter that is stored a second time here (docs/specs/checkpoints.md §3.4)."""

    @property
    def label(self) -> str:
        """Key of the parameter among all chunks of a rank: "chunk name"; a copy has that of its parameter."""
        return f"{self.chunk} {self.copy_of or self.local_name}"

    @property
    def is_parameter(self) -> bool:
        """Whether it is trained under this name: it is neither a copy nor a buffer."""
        return not self.copy_of and not is_buffer(self.name)

    @property
    def shard_numel(self) -> int:
        """Elements of one rank's shard."""
        return math.prod(self.shard_shape)


ShardStream = Iterator[tuple[StageRank, PlacedParameter, Rows]]
"""Rank, parameter there, and its shard."""


@dataclass(frozen=True)
class Placement:
    """Every parameter of a model wherever a layout stores it, in the order of named_parameters()."""

    config: TransformerConfig
    layout: Layout
    parameters: tuple[PlacedParameter, ...]


def place_parameters(config: TransformerConfig, layout: Layout, rows: int | None = None) -> Placement:
    """Compute where a layout stores every parameter.

    `rows`: rows of vocabulary matrices, where these are not padded as this layout demands.
    """
    ranks, tensors = Ranks(layout.tensor, layout.expert, count_experts(config)), list_parameters(config)
    placed: list[PlacedParameter] = []
    key = partial(sort_key, config, engine=layout.engine, grouped=layout.grouped)
    for name in sorted(tensors, key=key):
        parameter = _cut_by(layout, name, tensors[name])
        owners = ranks.owners(parameter)
        shape = stored_shape(config, parameter, layout.tensor, rows)
        experts = has_experts(config, name)
        for stage, chunk, local, copy_of in _locations(config, name, layout):
            local = to_local_expert_index(local, ranks.first_expert(owners[0]))
            stored = _get_stored_name(config, local, layout, experts=experts)
            placed.append(PlacedParameter(name, parameter, stage, chunk, local, stored, owners, shape, copy_of))
    return Placement(config, layout, tuple(placed))


def select_rank(placement: Placement, at: StageRank) -> list[list[PlacedParameter]]:
    """What a rank stores, for each of its chunks."""
    stage, rank = at
    here = [place for place in placement.parameters if place.stage == stage and rank in place.ranks]
    return [[place for place in here if place.chunk == chunk] for chunk in range(placement.layout.virtual)]


def named_parameters(placement: Placement, expert_rank: int = 0) -> dict[tuple[int, int], dict[str, PlacedParameter]]:
    """(stage, chunk) → local name → parameter, without second names; local names are the same on all expert ranks."""
    layout = placement.layout
    return {
        (stage, chunk): {place.local_name: place for place in places if place.is_parameter}
        for stage in range(layout.pipeline)
        for chunk, places in enumerate(select_rank(placement, (stage, expert_rank * layout.tensor)))
    }


def stream_shards(tensors: FusedTensors, placement: Placement, *, copies: bool = True) -> ShardStream:
    """Every rank's shard of each tensor, as the tensor arrives, under second names too if `copies` are wanted."""
    size = placement.layout.tensor
    by_name: dict[str, list[PlacedParameter]] = {}
    for place in placement.parameters:
        if copies or not place.copy_of:
            by_name.setdefault(place.name, []).append(place)
    for name, _, whole in tensors:
        for place in by_name[name]:
            for rank in place.ranks:
                yield (place.stage, rank), place, shard(whole, place.parameter, rank % size, size)


def _cut_by(layout: Layout, name: str, parameter: Parameter) -> Parameter:
    """The parameter as a layout's layers cut it: Megatron's own cut projections to compressed features too.

    Source: docs/specs/checkpoints.md §3.7.
    """
    return parameter if layout.engine or not name.endswith(DOWN_PROJECTIONS) else replace(parameter, cut=0)


def _get_stored_name(config: TransformerConfig, name: str, layout: Layout, *, experts: bool) -> str:
    """The name that a tensor bears in a `torch` file, for its name in a chunk; `experts`: its layer has some."""
    if layout.grouped:
        name = grouped_name(name)
    return te_name(config, name, experts=experts) if layout.engine else name


def _locations(config: TransformerConfig, name: str, layout: Layout) -> Iterator[tuple[int, int, str, str | None]]:
    """Stage, chunk and name there, and what this is a copy of; a tied embedding is the last stage's output layer too.

    A T5's encoder and decoder, on stages of their own, each begin with embeddings and end with an output layer, though
    the encoder's is of no use, and every stage has the relative biases of both: so Megatron-Core builds them.
    """
    stages = stack_stages(config, layout.pipeline, layout.encoder)
    stack, last = name.partition(".")[0], layout.virtual - 1
    if match := LAYER.match(name):
        layers = layer_locations(count_layers(config, name), len(stages[stack]), layout.virtual)
        stage, chunk, local = layers[int(match[1])]
        yield stages[stack][stage], chunk, shift_layer_index(name, local - int(match[1])), None
    elif stack in stages:
        yield stages[stack][-1], last, name, None
    elif name.startswith("embedding."):
        for stage in sorted({span[0] for span in stages.values()}):
            yield from _with_copies(config, stage, 0, name)
        if name == WORD_EMBEDDINGS and is_tied(config) and has_output(config):
            for stage in sorted({span[-1] for span in stages.values() if len(span) > 1}):
                yield from _with_copies(config, stage, last, OUTPUT_LAYER)
    else:
        ends = sorted({span[-1] for span in stages.values()})
        for stage in range(layout.pipeline) if stack.endswith(RELATIVE) else ends:
            yield from _with_copies(config, stage, last, name)


def _with_copies(
    config: TransformerConfig, stage: int, chunk: int, name: str
) -> Iterator[tuple[int, int, str, str | None]]:
    yield stage, chunk, name, None
    yield from ((stage, chunk, second, name) for second in second_names(config, name))
