"""What each of Megatron's ranks holds of a training state's tensors."""

from collections.abc import Iterator
from typing import Any

from mt_ckpt.accounting import accounted
from mt_ckpt.convert_format.order import named_parameters
from mt_ckpt.convert_format.state import MASTER, RandomStates, TrainingState, matching_masters
from mt_ckpt.megatron.fusing import Rows, shard
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.saver import Fused, fused

Place = tuple[int, int]
"""Pipeline stage, tensor rank."""


def streamed(state: TrainingState, kind: str, layout: Layout) -> Fused:
    """Megatron's tensors of the weights or of a kind of the optimizer's, whole, accounted for."""
    stream = {"model": state.weights, **state.optimizer, MASTER: lambda: matching_masters(state)}[kind]()
    tensors = accounted(f"{state.source}: {kind}", state.config.canonical_shapes(), stream)
    return fused(state.config, tensors, layout.tensor)


def shares(state: TrainingState, layout: Layout, tensors: Fused) -> Iterator[tuple[Place, int, str, Rows]]:
    """Place, chunk, local name and share of every rank, of each tensor as it comes."""
    owners: dict[str, list[tuple[int, int, str]]] = {}
    for (stage, chunk), names in named_parameters(state.config, layout).items():
        for own, (name, _) in names.items():
            owners.setdefault(name, []).append((stage, chunk, own))
    for name, one, whole in tensors:
        for stage, chunk, own in owners[name]:
            for rank in range(layout.tensor):
                yield (stage, rank), chunk, own, shard(whole, one, rank, layout.tensor)


def random_of(random: RandomStates | None, layout: Layout, at: Place) -> dict[str, Any]:
    """A rank's random state, if the layout is the one that it was saved under."""
    if random is None or (random.tensor, random.pipeline) != (layout.tensor, layout.pipeline):
        return {}
    return {"rng_state": random.states[at]}
