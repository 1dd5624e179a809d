"""The end of a step for routers: how often experts were chosen, on all ranks, and what follows from it.

Routers count on their own; here counts are summed once a step, biases are moved, and metrics come out.

Shape suffixes: L layers, E experts.
"""

from typing import Protocol, cast

import torch
from torch import Tensor

from mt_core.contracts import Model
from mt_core.distributed.mesh import Mesh
from mt_core.parallel.expert.sequence_shards import SequenceShards

METRICS = ("expert_load_max", "expert_load_min", "router_entropy", "dropped_share")


class CountingRouter(Protocol):
    """A module that counts the choices of experts in training."""

    shards: SequenceShards
    load: Tensor
    """Choices of each expert since the last step, int64 [E]."""
    dropped: Tensor
    """Choices since then that were dropped, int64."""
    entropy: Tensor
    """Sum of the entropies of tokens' probabilities since then, in nats, and the number of tokens, fp64 [2]."""

    def update_bias(self, load_E: Tensor, finite: Tensor) -> None:
        """Act on the choices of all ranks in a step; nothing may change unless `finite`."""
        ...


def list_routers(model: Model) -> list[CountingRouter]:
    """List the routers of a model, or of this rank's part of it."""
    return [cast(CountingRouter, module) for module in model.modules() if hasattr(module, "update_bias")]


@torch.no_grad()
def finish_routing(model: Model, mesh: Mesh, finite: Tensor) -> dict[str, Tensor]:
    """Let every router act on the choices of the step, and forget them; every rank must call it after the update.

    Returns metrics, each the mean over the model's layers: `expert_load_max` and `expert_load_min`, the choices of the
    most and the least chosen expert divided by the mean, `router_entropy` in nats, and `dropped_share`, of all choices.
    """
    routers = list_routers(model)
    if not routers and (mesh.pipeline.size == 1 or not _has_experts(model)):
        return {}
    total = torch.zeros(len(METRICS) + 1, dtype=torch.float64, device=finite.device)
    if routers:
        sums = torch.cat(
            [torch.cat((router.load.double(), router.entropy, router.dropped[None])) for router in routers]
        )
        sums = routers[0].shards.sum_step(sums)
        parts = sums.split([len(router.load) + 3 for router in routers])
        total += sum(_finish(router, part, finite) for router, part in zip(routers, parts, strict=True))
    *sums, layers = mesh.pipeline.sum_(total).unbind()
    return {name: value / layers for name, value in zip(METRICS, sums, strict=True)}


def _finish(router: CountingRouter, sums: Tensor, finite: Tensor) -> Tensor:
    """Let one router act on its sums over ranks; return its metrics, and 1 for its layer."""
    load_E, (entropy, tokens, dropped) = sums[:-3], sums[-3:].unbind()
    router.update_bias(load_E, finite)
    router.load.zero_()
    router.entropy.zero_()
    router.dropped.zero_()
    mean = load_E.mean()
    metrics = load_E.max() / mean, load_E.min() / mean, entropy / tokens, dropped / load_E.sum()
    return torch.stack((*metrics, torch.ones_like(mean)))


def _has_experts(model: Model) -> bool:
    """Whether the model, of which this rank may have a part without any, has experts."""
    return any(cut.axis == "expert" for cut in model.config.canonical_cuts().values())
