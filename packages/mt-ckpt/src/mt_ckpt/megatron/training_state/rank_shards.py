"""What each of Megatron's ranks holds of a training state's tensors."""

from collections.abc import Iterator
from typing import Any

from mt_ckpt.megatron.layout import Layout, rank_directory
from mt_ckpt.megatron.optimizer.param_order import owned_locations
from mt_ckpt.megatron.parameters.experts import count_experts, to_local_expert_index
from mt_ckpt.megatron.parameters.fusion import Rows, shard
from mt_ckpt.megatron.parameters.replicas import Ranks
from mt_ckpt.megatron.saver import FusedTensors, fused
from mt_ckpt.megatron.training_state.state import MASTER, RandomStates, TrainingState, matching_masters
from mt_ckpt.tensor_streams.accounting import check_stream

StageRank = tuple[int, int]
"""Pipeline stage, and a rank of it: expert rank · tensor ranks + tensor rank."""


def rank_directories(layout: Layout) -> dict[StageRank, str]:
    """Name of the directory of every rank's files."""
    return {
        (stage, rank): rank_directory(
            rank % layout.tensor, stage, layout.pipeline, rank // layout.tensor, layout.expert
        )
        for stage in range(layout.pipeline)
        for rank in range(layout.tensor * layout.expert)
    }


def stream_tensors(state: TrainingState, kind: str, layout: Layout) -> FusedTensors:
    """Megatron's tensors of the weights or of a kind of the optimizer's, whole, accounted for."""
    stream = {"model": state.weights, **state.optimizer, MASTER: lambda: matching_masters(state)}[kind]()
    tensors = check_stream(f"{state.source}: {kind}", state.config.canonical_shapes(), stream)
    return fused(state.config, tensors, layout.tensor)


def stream_shards(
    state: TrainingState, layout: Layout, tensors: FusedTensors
) -> Iterator[tuple[StageRank, int, str, Rows]]:
    """Place, chunk, local name and share of every rank, of each tensor as it comes."""
    ranks = Ranks(layout.tensor, layout.expert, count_experts(state.config))
    for name, one, whole in tensors:
        for stage, chunk, own in owned_locations(state.config, name, layout):
            for rank in ranks.owners(one):
                local = to_local_expert_index(own, ranks.first_expert(rank))
                yield (stage, rank), chunk, local, shard(whole, one, rank % layout.tensor, layout.tensor)


def get_rng_state(random: RandomStates | None, layout: Layout, at: StageRank) -> dict[str, Any]:
    """A rank's random state, if the layout is the one that it was saved under.

    `torch_dist` files have one for the expert ranks together: that of the first.
    """
    if random is None or (random.tensor, random.pipeline) != (layout.tensor, layout.pipeline):
        return {}
    stage, rank = at
    return {"rng_state": random.states.get(at) or random.states[stage, rank % layout.tensor]}
