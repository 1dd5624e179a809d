"""What `mt plan` prints of a run with a pipeline: one rank of it as without, and all schedules in one table."""

import shlex
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mt_cli.plan.report import (
    describe_communication,
    describe_explanation,
    describe_head,
    describe_memory,
    describe_step,
    get_plan_values,
)
from mt_core.config.run_config import TransformerRun
from mt_core.parallel.layout import stage_problems
from mt_core.pipeline.layout_string import format_layout
from mt_core.pipeline.schedule_table import SCHEDULES
from mt_core.planning.gpu_profile import Profile
from mt_core.planning.memory import GIB
from mt_core.planning.pipeline.pipeline_plan import ASSUMPTIONS, PipelinePlan
from mt_core.planning.pipeline.schedule_comparison import Candidate, Recommendation
from mt_core.planning.plan import ASSUMPTIONS as ALWAYS


class Faster(NamedTuple):
    """What makes a recommended schedule faster, where anything does."""

    balanced: Candidate | None
    """Stages that take equally long."""
    ordered: Candidate | None
    """Passes ordered by their times, with those stages."""


def list_lines(
    config: TransformerRun,
    plan: PipelinePlan,
    profile: Profile,
    candidates: Sequence[Candidate],
    recommended: Recommendation | None,
    faster: Faster,
    *,
    explain: bool,
) -> Iterator[str]:
    """The whole report."""
    fullest, busiest = plan.plans[plan.fullest], plan.plans[plan.busiest]
    yield from describe_head(config, busiest, profile)
    yield from _describe_pipeline(config, plan)
    yield from describe_memory(fullest, explain=explain, whose=f"pipeline rank {plan.fullest}")
    totals = ", ".join(f"{each.total / GIB:.1f}" for each in plan.plans)
    yield f"  {'every rank of the pipeline':<34}{totals}"
    yield from _describe_schedules(plan, candidates)
    yield from _describe_recommendation(recommended, faster)
    yield from describe_communication(busiest, profile, whose=f"rank {plan.busiest}")
    yield from describe_step(config, busiest, profile, _count_gpus(plan), whose=f" of rank {plan.busiest}")
    if explain:
        yield from describe_explanation(profile, (*ALWAYS, *ASSUMPTIONS))
    else:
        yield from ["", "--explain lists every item and all assumptions"]


def _count_gpus(plan: PipelinePlan) -> int:
    return plan.plans[0].layout.dims.ranks * len(plan.plans)


def _describe_pipeline(config: TransformerRun, plan: PipelinePlan) -> Iterator[str]:
    placement, kind = plan.schedule.placement, SCHEDULES[plan.schedule.name]
    each = f", {placement.chunks} stages each" if placement.chunks > 1 else ""
    shape = " in V shape" if placement.shape == "v" else ""
    yield f"pipeline   {placement.ranks} ranks{each}{shape}: {kind.title}, {format_layout(plan.stages)}"
    yield from (f"           {problem}" for problem in stage_problems(config))


def _describe_schedules(plan: PipelinePlan, candidates: Sequence[Candidate]) -> Iterator[str]:
    """One row a schedule; the chosen one is marked."""
    yield (
        f"\n{'schedules':<24}{'bubble %':>10}{'activations GiB':>20}{'most GiB':>10}{'GB sent':>9}{'ms a step':>11}"
        f"  {plan.schedule.microbatches} microbatches"
    )
    for candidate in candidates:
        name = candidate.name + (f", {candidate.chunks} stages" if candidate.name == "interleaved" else "")
        chosen = (candidate.name, candidate.chunks) == (plan.schedule.name, plan.schedule.placement.chunks)
        mark = "*" if chosen else " "
        if candidate.plan is None:
            yield f"{mark} {name:<22}  {candidate.reason}"
            continue
        other = candidate.plan
        peaks = [peak / GIB for peak in other.timeline.peak_activations]
        kept = f"{min(peaks):.2f} to {max(peaks):.2f}"
        most = other.plans[other.fullest].total / GIB
        fits = "" if other.fits else "  does not fit"
        cut = "" if _is_even(other) or other.stages == plan.stages else f"  {format_layout(other.stages)}"
        yield (
            f"{mark} {name:<22}{other.timeline.bubble * 100:>10.1f}{kept:>20}{most:>10.2f}{other.sent / 1e9:>9.2f}"
            f"{other.seconds * 1e3:>11,.1f}{fits}{cut}"
        )


def _describe_recommendation(recommended: Recommendation | None, faster: Faster) -> Iterator[str]:
    """What to set, and the stages and the order of passes that make it faster still."""
    if recommended is None:
        return
    yield f"  recommended: {_join(recommended.candidate)} ({recommended.reason})"
    before = recommended.candidate.plan
    for what, each in (("stages of equal time", faster.balanced), ("passes ordered by their times", faster.ordered)):
        if before and each and each.plan:
            less = 1 - each.plan.seconds / before.seconds
            bubble = f"bubble {each.plan.timeline.bubble:.1%}"
            yield f"  with {what}: {_join(each)} ({each.plan.seconds * 1e3:,.1f} ms, {less * 100:.1f}% less; {bubble})"


def _join(candidate: Candidate) -> str:
    """Changes as options for a shell."""
    return " ".join(f"--set {shlex.quote(change)}" for change in candidate.changes)


def _is_even(plan: PipelinePlan) -> bool:
    """Whether all stages have as many layers."""
    return len({len(stage.layers) for stage in plan.stages}) == 1


def get_values(
    config: TransformerRun,
    plan: PipelinePlan,
    profile: Profile,
    candidates: Sequence[Candidate],
    recommended: Recommendation | None,
    faster: Faster,
) -> dict[str, Any]:
    """Everything in the report as plain values: bytes, seconds, shares of 1; memory is that of the fullest rank."""
    gpus = _count_gpus(plan)
    values = get_plan_values(config, plan.plans[plan.busiest], profile, gpus)
    full = get_plan_values(config, plan.plans[plan.fullest], profile, gpus)["memory"]
    values["layout"]["pipeline"] = len(plan.plans)
    return values | {
        "memory": full | {"rank": plan.fullest, "totals": [each.total for each in plan.plans]},
        "pipeline": {
            "microbatches": plan.schedule.microbatches,
            **_get_schedule_values(plan),
            "schedules": [_get_candidate_values(candidate) for candidate in candidates],
            "recommended": None
            if recommended is None
            else {"set": list(recommended.candidate.changes), "reason": recommended.reason},
            "balanced": _get_change_values(faster.balanced),
            "ordered": _get_change_values(faster.ordered),
        },
        "advice": [],
        "assumptions": [*ALWAYS, *ASSUMPTIONS],
    }


def _get_candidate_values(candidate: Candidate) -> dict[str, Any]:
    if candidate.plan is None:
        return {"schedule": candidate.name, "virtual_stages": candidate.chunks, "refused": candidate.reason}
    return _get_schedule_values(candidate.plan)


def _get_change_values(candidate: Candidate | None) -> dict[str, Any] | None:
    if candidate is None or candidate.plan is None:
        return None
    return {"set": list(candidate.changes), **_get_schedule_values(candidate.plan)}


def _get_schedule_values(plan: PipelinePlan) -> dict[str, Any]:
    return {
        "schedule": plan.schedule.name,
        "virtual_stages": plan.schedule.placement.chunks,
        "layout": format_layout(plan.stages),
        "bubble": plan.timeline.bubble,
        "longest_pause": plan.timeline.paused,
        "peak_activations": list(plan.timeline.peak_activations),
        "totals": [each.total for each in plan.plans],
        "fits": plan.fits,
        "bytes_sent": plan.sent,
        "seconds": plan.seconds,
    }
