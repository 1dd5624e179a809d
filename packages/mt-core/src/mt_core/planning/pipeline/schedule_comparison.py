"""Every pipeline schedule for one run, side by side, and the one to choose."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mt_core.config.run_config import PlannedRun
from mt_core.errors import MtError, raise_if
from mt_core.parallel.layout import Layout
from mt_core.pipeline.layout_string import Stage, format_layout
from mt_core.pipeline.list_scheduling import PassTimes
from mt_core.pipeline.rank_schedules import ScheduleSize
from mt_core.pipeline.schedule_table import SCHEDULES, build_schedule, list_problems
from mt_core.pipeline.stages import balance_stages, count_layers, cut_stages
from mt_core.planning.communication import micro_batches
from mt_core.planning.gpu_profile import Profile
from mt_core.planning.pipeline.pipeline_plan import PipelinePlan, balance_by_time, plan_schedule

INTERLEAVED = (2, 4)
"""Stages of a rank that are tried with interleaving, beside the number that a configuration asks for."""
EQUAL = 0.005
"""Share of the time by which two schedules may differ and still count as equally fast."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A schedule, and its plan or why it has none."""

    name: str
    chunks: int
    plan: PipelinePlan | None = None
    reason: str = ""
    layout: str = ""
    """The layout of its stages, where that is to be set."""
    pass_times: tuple[PassTimes, ...] | None = None
    """The times that its passes are ordered by, where those are to be set."""

    @property
    def changes(self) -> tuple[str, ...]:
        """What to set, as values of `--set`."""
        several = (f"pipeline.virtual_stages={self.chunks}",) if self.name == "interleaved" else ()
        layout = (f'pipeline.layout="{self.layout}"',) if self.layout else ()
        times = (f"pipeline.pass_times={json.dumps(self.pass_times)}",) if self.pass_times else ()
        return (f"pipeline.schedule={self.name}", *several, *layout, *times)


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The schedule to choose."""

    candidate: Candidate
    reason: str


def compare_schedules(
    config: PlannedRun, layout: Layout, profile: Profile, counts: Sequence[int] = ()
) -> list[Candidate]:  # fmt: skip
    """Every schedule with the microbatches, layers and GPUs of a run, in the order of `SCHEDULES`.

    `counts` are the microbatches of other steps, as of a batch that grows: a schedule that refuses one has no plan.
    """
    return [_try_schedule(config, layout, profile, (name, chunks), counts) for name, chunks in _list_variants(config)]


def _list_variants(config: PlannedRun) -> Iterator[tuple[str, int]]:
    asked = config.pipeline.virtual_stages
    for name, kind in SCHEDULES.items():
        if name == "interleaved":
            yield from ((name, chunks) for chunks in sorted({*INTERLEAVED, max(asked or 0, 2)}))
        else:
            yield name, kind.chunks[0]


def _try_schedule(
    config: PlannedRun, layout: Layout, profile: Profile, variant: tuple[str, int], counts: Sequence[int]
) -> Candidate:
    name, chunks = variant
    group = config.pipeline.microbatch_group_size if name == "interleaved" else None
    times = config.pipeline.pass_times if name == config.pipeline.schedule else None
    size = ScheduleSize(config.parallel.pipeline, micro_batches(config, layout), chunks, group, times)
    if size.ranks * chunks > config.model.layers:
        return Candidate(name, chunks, reason=f"{config.model.layers} layers for {size.ranks * chunks} stages")
    try:
        for count in counts:
            raise_if(list_problems(name, replace(size, microbatches=count)))
        schedule = build_schedule(name, size)
    except MtError as err:
        return Candidate(name, chunks, reason=f"{err.problems[0].actual}; {err.problems[0].allowed}")
    try:
        stages: tuple[Stage, ...] = cut_stages(count_layers(config.model), schedule.placement, config.pipeline)
    except MtError:  # a layout for another number of stages, or one that does not divide by this one
        stages = balance_stages(config.model.layers, schedule.placement.stages)
    return Candidate(name, chunks, plan_schedule(config, layout, profile, schedule, stages))


def recommend_schedule(candidates: Sequence[Candidate]) -> Recommendation | None:
    """The fastest that fits, and of equally fast ones that with least memory; None if no schedule is possible.

    If none fits, it is the one that needs least.
    """
    plans = [(candidate, candidate.plan) for candidate in candidates if candidate.plan]
    if not plans:
        return None
    fitting = [(candidate, plan) for candidate, plan in plans if plan.fits]
    if not fitting:
        best = min(plans, key=lambda pair: _get_most(pair[1]))
        return Recommendation(best[0], "none fits; this one needs least memory")
    fastest = min(plan.seconds for _, plan in fitting)
    equal = [pair for pair in fitting if pair[1].seconds <= fastest * (1 + EQUAL)]
    best = min(equal, key=lambda pair: _get_most(pair[1]))
    plain = next((plan for candidate, plan in plans if candidate.name == "1f1b"), None)
    return Recommendation(best[0], _explain(best, plain, alone=len(equal) == 1))


def balance_candidate(config: PlannedRun, layout: Layout, profile: Profile, candidate: Candidate) -> Candidate | None:
    """A schedule with stages that take equally long, if that makes its step shorter and still fits as before."""
    if candidate.plan is None:
        return None
    schedule = candidate.plan.schedule
    stages = balance_by_time(config, layout, profile, schedule.placement)
    plan = plan_schedule(config, layout, profile, schedule, stages)
    shorter = plan.seconds < candidate.plan.seconds * (1 - EQUAL) and plan.fits >= candidate.plan.fits
    return replace(candidate, plan=plan, layout=format_layout(stages)) if shorter else None


def order_candidate(config: PlannedRun, layout: Layout, profile: Profile, candidate: Candidate) -> Candidate | None:
    """A generated schedule with its passes ordered by their times, if that makes its step shorter and still fits."""
    if candidate.plan is None or not SCHEDULES[candidate.name].generated:
        return None
    plain = candidate.plan
    unit = max(map(max, plain.times)) / 100
    times = tuple((max(round(f / unit, 1), 0.1), round(i / unit, 1), round(w / unit, 1)) for f, i, w in plain.times)
    size = ScheduleSize(config.parallel.pipeline, plain.schedule.microbatches, candidate.chunks, pass_times=times)
    plan = plan_schedule(config, layout, profile, build_schedule(candidate.name, size), plain.stages)
    shorter = plan.seconds < plain.seconds * (1 - EQUAL) and plan.fits >= plain.fits
    return replace(candidate, plan=plan, pass_times=times) if shorter else None


def _explain(best: tuple[Candidate, PipelinePlan], plain: PipelinePlan | None, *, alone: bool) -> str:
    what = "the fastest that fits" if alone else "as fast as any that fits, with least memory"
    if best[0].name == "1f1b" or plain is None:
        return what
    return f"{what}; {(1 - best[1].seconds / plain.seconds) * 100:.1f}% less time than 1f1b"


def _get_most(plan: PipelinePlan) -> float:
    """Bytes of the rank that needs most."""
    return plan.plans[plan.fullest].total
