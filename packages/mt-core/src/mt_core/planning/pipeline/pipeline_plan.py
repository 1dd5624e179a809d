"""A plan with a pipeline: what each of its ranks holds, sends and takes under one schedule.

Tensor, context and data ranks of one stage are planned as they are without a pipeline, for the layers of that stage.
The schedule is simulated with the times and activations of the stages, and says when each runs, and what is held.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from math import prod

from mt_core.config.run_config import PlannedRun
from mt_core.errors import Problem, raise_if
from mt_core.parallel.layout import Layout, Recompute, build_layout, problems
from mt_core.parallel.nearest_layouts import suggest_nearest
from mt_core.pipeline.actions import Placement, Schedule
from mt_core.pipeline.layout_string import Stage
from mt_core.pipeline.list_scheduling import PassTimes
from mt_core.pipeline.schedule_table import build_schedule, get_size, list_problems
from mt_core.pipeline.simulator import StageCosts, Timeline, simulate
from mt_core.pipeline.stages import balance_unequal, count_layers, cut_stages
from mt_core.planning.activations import count_activations
from mt_core.planning.communication import Phase, Transfer, micro_batches, transfers
from mt_core.planning.compute import Compute, compute
from mt_core.planning.gpu_profile import Profile
from mt_core.planning.layer_costs import count_tokens
from mt_core.planning.memory import GIB, Item, count_working, memory
from mt_core.planning.parameters import count_rank_elements
from mt_core.planning.plan import Plan
from mt_core.planning.precision import BYTES, state_bytes
from mt_core.planning.stage_model import cut_run, drop_pipeline, get_kind, is_tied
from mt_core.planning.step_time import Passes, StepTime, Sync, divide_work, predict_passes, predict_sync

ASSUMPTIONS = (
    "Tensors between stages travel beside the arithmetic of both, and never wait for each other.",
    "Where the backward pass is split, activations are kept until the weights' gradients are computed, recomputed ones "
    "too; the weights' gradients of routers and of the output layer are computed along with the inputs'.",
    "With fsdp no backward pass is split: schedules that would split it run it whole.",
    "Passes that DualPipeV runs together are computed one after the other, as mt train does.",
)


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """What a schedule means on one kind of GPU."""

    timeline: Timeline
    """In seconds and bytes."""
    stages: tuple[Stage, ...]
    plans: tuple[Plan, ...]
    """The plan of each rank of the pipeline; the step of all is equally long."""
    times: tuple[PassTimes, ...]
    """Seconds of each stage's forward, input and weight pass."""

    @property
    def schedule(self) -> Schedule:
        """The order of passes."""
        return self.timeline.schedule

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.plans[0].step.seconds

    @property
    def fullest(self) -> int:
        """The rank that needs most memory."""
        return max(range(len(self.plans)), key=lambda rank: self.plans[rank].total)

    @property
    def busiest(self) -> int:
        """The rank that computes longest."""
        return max(range(len(self.plans)), key=lambda rank: self.timeline.work[rank])

    @property
    def fits(self) -> bool:
        """Whether every rank has the memory that it needs."""
        return all(plan.fits for plan in self.plans)

    @property
    def sent(self) -> float:
        """Bytes that the rank with most to send to other stages sends in a step."""
        return max(
            sum(t.sent * plan.micro_batches for t in plan.transfers if t.axis == "pipeline" and t.phase != "reduce")
            for plan in self.plans
        )


def check_pipeline(config: PlannedRun, gpus: int) -> Layout:
    """The layout of the ranks of one stage; `MtError` says why there is none, and which are near."""
    stages, one = config.parallel.pipeline, drop_pipeline(config)
    if gpus % stages:
        divisors = ", ".join(str(n) for n in range(1, gpus + 1) if gpus % n == 0)
        raise_if([Problem("parallel.pipeline", f"{stages} does not divide {gpus} GPUs", f"allowed: {divisors}")])
    if failures := list(problems(one, gpus // stages)):
        failures.append(suggest_nearest(one, gpus // stages))
    raise_if(failures)
    return build_layout(one, gpus // stages)


def plan_pipeline(config: PlannedRun, layout: Layout, profile: Profile) -> PipelinePlan:
    """The plan of the schedule and the stages that a configuration asks for; `MtError` if they do not fit together."""
    keys, size = config.pipeline, get_size(config, micro_batches(config, layout))
    raise_if(list_problems(keys.schedule, size, samples=layout.micro_batch * layout.dims.data))
    schedule = build_schedule(keys.schedule, size)
    stages = cut_stages(count_layers(config.model), schedule.placement, keys)
    return plan_schedule(config, layout, profile, schedule, stages)


def balance_by_time(
    config: PlannedRun, layout: Layout, profile: Profile, placement: Placement
) -> tuple[Stage, ...]:  # fmt: skip
    """Stages that take equally long, as far as whole layers allow: embedding and head leave fewer to their stages."""
    ends = (Stage(range(0), embedding=True), Stage(range(0), loss=True))
    parts = [
        cut_run(config, [stage]) for stage in (*(Stage(range(n, n + 1)) for n in range(config.model.layers)), *ends)
    ]
    kinds = [get_kind(part, layout) for part in parts]
    seconds = {kind: predict_passes(part, layout, profile).seconds for kind, part in zip(kinds, parts, strict=True)}
    *layers, first, last = (seconds[kind] for kind in kinds)
    return balance_unequal(layers, placement.stages, first=first, last=last)


def plan_schedule(
    config: PlannedRun, layout: Layout, profile: Profile, schedule: Schedule, stages: tuple[Stage, ...]
) -> PipelinePlan:
    """The plan of one schedule with stages of its placement."""
    return _Planner(config, layout, profile, schedule, stages).plan()


def can_split_backward(config: PlannedRun) -> bool:
    """Whether gradients of weights can be computed apart from those of inputs, as schedules without a bubble need."""
    return config.parallel.sharding != "fsdp"


def count_split_share(part: PlannedRun) -> float:
    """The share of a stage's products with weights whose gradients can wait: those of linear layers and experts, not of
    routers and the head."""
    model = part.model
    total = model.flops_per_token(0)
    routers = sum(prod(shape) for name, shape in model.canonical_shapes().items() if name.endswith("router.weight"))
    return (model.layer_flops(0, range(model.layers)) - 6 * routers) / total if total else 0.0


class _Planner:
    """The parts of a model on the ranks of a pipeline, and their costs."""

    def __init__(
        self, config: PlannedRun, layout: Layout, profile: Profile, schedule: Schedule, stages: tuple[Stage, ...]
    ) -> None:
        self.config, self.layout, self.profile = config, layout, profile
        self.placement, self.schedule, self.stages = schedule.placement, schedule, stages
        self.by_rank = [self.placement.get_stages(rank) for rank in range(self.placement.ranks)]
        self.parts = [cut_run(config, [stage]) for stage in stages]
        self.rank_parts = [cut_run(config, [stages[number] for number in numbers]) for numbers in self.by_rank]
        self.passes = self._predict_alike()

    def _predict_alike(self) -> list[Passes]:
        """The passes of every stage; those of stages of one kind are predicted once."""
        kinds = [get_kind(part, self.layout) for part in self.parts]
        parts = dict(zip(kinds, self.parts, strict=True))
        alike = {kind: predict_passes(part, self.layout, self.profile) for kind, part in parts.items()}
        return [alike[kind] for kind in kinds]

    def plan(self) -> PipelinePlan:
        """Simulate the step, and count what each rank has of it."""
        costs = [self._count_costs(each, part) for each, part in zip(self.passes, self.parts, strict=True)]
        send = self._make_send("", "forward", 1).seconds(self.profile)
        timeline = simulate(self.schedule.in_sequence(), costs, send=send)
        sync = [self._predict_sync(rank) for rank in range(self.placement.ranks)]
        ends = (
            timeline.events[rank][-1].end + each.after + self._count_tied_seconds(rank)
            for rank, each in enumerate(sync)
        )
        seconds = max(each.before for each in sync) + max(ends)
        plans = tuple(
            Plan(
                self.layout,
                self._count_memory(rank, timeline),
                [*transfers(self.rank_parts[rank], self.layout), *self._list_transfers(rank)],
                StepTime(seconds, (), self._divide_step(rank, timeline, seconds, sync[rank])),
                self.schedule.microbatches,
                self.profile.memory_gib * GIB,
            )
            for rank in range(self.placement.ranks)
        )
        times = tuple((each.forward, each.backward_input, each.backward_weight) for each in costs)
        return PipelinePlan(timeline, self.stages, plans, times)

    def _count_costs(self, passes: Passes, part: PlannedRun) -> StageCosts:
        """Times and activations of a stage; what runs along with the gradients of inputs counts as theirs."""
        saved = count_activations(part, self.layout).saved
        share = count_split_share(part) if can_split_backward(self.config) else 0.0
        weight = passes.backward_weight * share
        rest = passes.backward_input + passes.backward_weight - weight
        kept = count_activations(part, replace(self.layout, recompute=Recompute())).saved if share else 0.0
        return StageCosts(passes.forward, rest, weight, saved, kept / saved if saved else 0.0)

    def _predict_sync(self, rank: int) -> Sync:
        """What a rank does once a step, tied embeddings left out."""
        part = self.rank_parts[rank]
        return predict_sync(part, self.layout, self.profile, predict_passes(part, self.layout, self.profile))

    def _count_tied_seconds(self, rank: int) -> float:
        """Seconds in which the first and the last rank sum the gradients of an embedding that both have."""
        return sum(t.seconds(self.profile) for t in self._list_transfers(rank) if t.phase == "reduce")

    def _make_send(self, what: str, phase: Phase, calls: float) -> Transfer:
        """Tensors to the ranks of other stages, which may be on other nodes."""
        size = self._count_features()
        return Transfer("pipeline", 2, "send", what, phase, calls, size, "passes of both ranks", self._span)

    def _count_features(self) -> float:
        """Bytes of a micro-batch's features between two stages, on one rank."""
        width = self.config.model.hidden_size * BYTES[self.config.precision.dtype]
        return count_tokens(self.config, self.layout) * width / self.layout.sequence_parts

    @property
    def _span(self) -> int:
        """Ranks from the first to the last stage."""
        return self.layout.dims.ranks * self.placement.ranks

    def _list_transfers(self, rank: int) -> Iterator[Transfer]:
        """What a rank sends to other stages: features, gradients, and that of a tied embedding once a step."""
        features, gradients = self.placement.count_sends(rank)
        if features:
            yield self._make_send("features, to the next stage", "forward", features)
        if gradients:
            yield self._make_send("their gradients, to the stage before", "backward", gradients)
        first, last = self.placement.get_rank(0), self.placement.get_rank(self.placement.stages - 1)
        if is_tied(self.config.model) and first != last and rank in (first, last):
            model, tensor = self.config.model, self.layout.dims.tensor
            cut, shape = model.canonical_cuts().get("embed.weight"), model.canonical_shapes()["embed.weight"]
            size = count_rank_elements(shape, cut, tensor) * state_bytes(self.config.precision).gradient
            what = "gradients of the tied embedding"
            yield Transfer("pipeline", 2, "all-reduce", what, "reduce", 1, size, span=self._span)

    def _count_memory(self, rank: int, timeline: Timeline) -> list[Item]:
        """The state of all stages of a rank, its activations at their peak, and the largest pass of one stage."""
        working = [count_working(self.parts[number], self.layout) for number in self.by_rank[rank]]
        largest = max((items[1] for items in working), key=lambda item: item.size)
        kept = Item("activations", "of microbatches in flight", timeline.peak_activations[rank])
        sent = 2 * self._count_features() if any(self.placement.count_sends(rank)) else 0
        travelling = Item("buffers", "on the way between stages", sent)
        items = memory(self.rank_parts[rank], self.layout, self.profile, [kept, largest])
        return [*items, *([travelling] if sent else [])]

    def _divide_step(self, rank: int, timeline: Timeline, seconds: float, sync: Sync) -> dict[str, float]:
        """Seconds of a rank's step by what they go to; what is left over is the bubble."""
        count, numbers = self.schedule.microbatches, self.by_rank[rank]
        works = [compute(self.parts[number], self.layout, self.profile) for number in numbers]
        optimizer = compute(self.rank_parts[rank], self.layout, self.profile).optimizer
        work = replace(Compute(*map(sum, zip(*map(astuple, works), strict=True))), optimizer=optimizer)
        waited: dict[str, float] = {}
        for number in numbers:
            for axis, waiting in self.passes[number].waited.items():
                waited[axis] = waited.get(axis, 0.0) + waiting * count
        waited = {axis: waited.get(axis, 0.0) + sync.waited.get(axis, 0.0) for axis in {**waited, **sync.waited}}
        parts = divide_work(work, count, waited)
        return parts | {"waiting for other stages": seconds - sum(parts.values())}
