"""What each of Megatron's ranks holds of a training state's tensors."""

from typing import Any

from mt_ckpt.megatron.layout import Layout, StageRank
from mt_ckpt.megatron.parameters.fusion import FusedTensors, fuse_stream
from mt_ckpt.megatron.placement import Placement, ShardStream, stream_shards
from mt_ckpt.megatron.training_state.state import RandomStates, TrainingState, stream_checked


def stream_tensors(state: TrainingState, kind: str, layout: Layout) -> FusedTensors:
    """Megatron's tensors of the weights or of a kind of the optimizer's, whole, accounted for."""
    return fuse_stream(state.config, stream_checked(state, kind), layout.tensor)


def stream_rank_shards(state: TrainingState, placement: Placement, kind: str) -> ShardStream:
    """Every rank's shard of each tensor of a kind as it arrives; second names of parameters are left out."""
    return stream_shards(stream_tensors(state, kind, placement.layout), placement, copies=False)


def get_rng_state(random: RandomStates | None, layout: Layout, at: StageRank) -> dict[str, Any]:
    """A rank's random state, if the layout is the one that it was saved under.

    `torch_dist` files have one for the expert ranks together: that of the first.
    """
    if random is None or (random.tensor, random.pipeline) != (layout.tensor, layout.pipeline):
        return {}
    stage, rank = at
    return {"rng_state": random.states.get(at) or random.states[stage, rank % layout.tensor]}
