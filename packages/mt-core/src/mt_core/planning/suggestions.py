"""What would make a run fit: every nearby layout that does, fewest changes first, then the fastest."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import gcd

from mt_core.config.run_config import PlannedRun
from mt_core.contracts import PlannedModelConfig
from mt_core.parallel.layout import Layout, Recompute, axis_problems, get_cut_sizes
from mt_core.parallel.nearest_layouts import cuts
from mt_core.planning.gpu_profile import Profile
from mt_core.planning.memory import GIB, memory, total
from mt_core.planning.plan import Plan, plan_layout

SHARDING = ("replicate", "zero1", "fsdp")
"""Each holds less than the one before."""
MOST_TIMES = 64
"""How many times the ranks asked for are tried at most."""


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A layout that fits."""

    changes: tuple[tuple[str, ...], ...]
    """Groups of `section.field=value` that belong together."""
    plan: Plan


def find_fitting_layouts(
    config: PlannedRun, layout: Layout, profile: Profile, *, ranks: int, count: int = 5
) -> list[Suggestion]:
    """Up to `count` layouts of `ranks` that fit; fewer changes are preferred, then speed."""
    ranked: dict[int, dict[object, list[Layout]]] = {}
    for other in _others(layout, ranks, config.model):
        if not any(axis_problems(config, other)):
            alike = replace(other, recompute=Recompute())
            ranked.setdefault(len(changes(layout, other)), {}).setdefault(alike, []).append(other)
    fitting: list[Suggestion] = []
    for number in sorted(ranked):
        best = (_fastest(config, layout, profile, others) for others in ranked[number].values())
        fitting += sorted(filter(None, best), key=lambda advice: advice.plan.step.seconds)
        if fitting:
            break
    return fitting[:count]


def find_fitting_ranks(config: PlannedRun, layout: Layout, profile: Profile) -> tuple[int, Suggestion] | None:
    """The fewest ranks, doubling those of `layout`, on which something fits, and what."""
    ranks = layout.dims.ranks * 2
    while ranks <= layout.dims.ranks * MOST_TIMES:
        if fitting := find_fitting_layouts(config, layout, profile, ranks=ranks, count=1):
            return ranks, fitting[0]
        ranks *= 2
    return None


def _fastest(config: PlannedRun, layout: Layout, profile: Profile, others: list[Layout]) -> Suggestion | None:
    """The fastest of layouts that differ in what is computed again."""
    capacity = profile.memory_gib * GIB
    fitting = [other for other in others if total(memory(config, other, profile)) <= capacity]
    plans = [Suggestion(changes(layout, other), plan_layout(config, other, profile)) for other in fitting]
    return min(plans, key=lambda advice: advice.plan.step.seconds, default=None)


def _others(layout: Layout, ranks: int, model: PlannedModelConfig) -> Iterator[Layout]:
    """Everything that saves memory, alone and together."""
    tensors, contexts = ([size * 2**n for n in range(4)] for size in (layout.dims.tensor, layout.dims.context))
    cut = [c for c in cuts(layout, ranks) if c.dims.tensor in tensors and c.dims.context in contexts]
    cut = [
        recut for c in cut for recut in _cut_experts(c, gcd(*(size.size for size in get_cut_sizes(model, "expert"))))
    ]
    micros = [layout.micro_batch // 2**n for n in range(8) if layout.micro_batch % 2**n == 0]
    shardings = SHARDING[SHARDING.index(layout.sharding) :]
    for other, sharding, recompute, micro in product(
        cut, shardings, _recomputes(layout.recompute, model.layers), micros
    ):
        for sequence in {other.sequence, other.dims.tensor > 1}:
            for shard in {other.dims.shard, None} if sharding != "replicate" else {1}:
                if shard == 1 and sharding != "replicate":
                    continue
                dims = replace(other.dims, shard=shard)
                yield replace(
                    other, dims=dims, sequence=sequence, sharding=sharding, recompute=recompute, micro_batch=micro
                )


def _cut_experts(layout: Layout, experts: int) -> Iterator[Layout]:
    """The layout, and with its experts cut over 2, 4 and 8 times as many ranks, as far as they divide."""
    for size in [layout.dims.expert * 2**n for n in range(4)]:
        if size == layout.dims.expert or (experts and gcd(experts, layout.dims.data * layout.dims.context) % size == 0):
            yield replace(layout, dims=replace(layout.dims, expert=size))


def _recomputes(present: Recompute, layers: int) -> list[Recompute]:
    """The present one, that of the core, of some layers in eighths, and of all."""
    some = [Recompute("full", "block", count) for count in sorted({layers * n // 8 for n in range(1, 8)} - {0})]
    return list(dict.fromkeys([present, Recompute("selective"), *some, Recompute("full", "uniform", 1)]))


def changes(old: Layout, new: Layout) -> tuple[tuple[str, ...], ...]:
    """What differs, as values of `--set`; what belongs together is one change."""
    together = new.dims.data * new.dims.context
    groups = (
        {
            "parallel.tensor": (old.dims.tensor, new.dims.tensor),
            "parallel.context": (old.dims.context, new.dims.context),
            "parallel.data": (old.dims.data, new.dims.data),
            "parallel.expert": (old.dims.expert, new.dims.expert),
            "parallel.expert_tensor": (old.expert_tensor, new.expert_tensor),
            "parallel.sequence": (str(old.sequence).lower(), str(new.sequence).lower()),
        },
        {
            "parallel.sharding": (old.sharding, new.sharding),
            "parallel.shard_size": (
                (old.dims.shard or together, new.dims.shard or together) if old.sharding != "replicate" else (0, 0)
            ),
        },
        {
            "recompute.granularity": (old.recompute.granularity, new.recompute.granularity),
            "recompute.method": (old.recompute.method, new.recompute.method),
            "recompute.layers": (old.recompute.layers, new.recompute.layers),
        },
        {"batch.micro_batch": (old.micro_batch, new.micro_batch)},
    )
    changed = (tuple(f"{key}={now}" for key, (was, now) in group.items() if was != now) for group in groups)
    return tuple(group for group in changed if group)
