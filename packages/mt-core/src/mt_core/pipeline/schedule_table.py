"""Every schedule by its name: how its chunks lie on ranks, which numbers it takes, and what makes its lists."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice

from mt_core.config.run_config import RunConfig
from mt_core.errors import Problem, raise_if
from mt_core.pipeline.actions import Placement, Schedule, Shape, Step
from mt_core.pipeline.list_scheduling import ZB_2P, ZBV, StepsByRank, Urgency, fit_steps
from mt_core.pipeline.rank_schedules import (
    ScheduleSize,
    order_1f1b,
    order_dualpipev,
    order_gpipe,
    order_interleaved,
    order_zb_h1,
)
from mt_core.plugins import did_you_mean


@dataclass(frozen=True, slots=True)
class ScheduleKind:
    """What is fixed about a schedule, whatever its size."""

    title: str
    order: Callable[[ScheduleSize, Placement], StepsByRank]
    shape: Shape = "loop"
    chunks: tuple[int, int | None] = (1, 1)
    """Fewest and most stages of a rank."""
    generated: bool = False
    """Whether the times of passes decide on their order."""
    split_backward: bool = False
    """Whether gradients of inputs and of weights are computed apart."""
    overlapping: bool = False
    """Whether forward and backward passes run together."""
    takes: Callable[[ScheduleSize], bool] = lambda size: True
    """Whether the number of microbatches passes."""
    rule: str = ""
    """What it asks of the number of microbatches, in words."""


def _by_rank(order: Callable[[int, ScheduleSize], list[Step]]) -> Callable[[ScheduleSize, Placement], StepsByRank]:
    return lambda size, placement: tuple(tuple(order(rank, size)) for rank in range(size.ranks))


def _generate(urgency: Urgency, size: ScheduleSize, placement: Placement) -> StepsByRank:
    """Activations of at most twice as many stages as there are ranks."""
    return fit_steps(placement, size.microbatches, urgency, size.pass_times, most_live=2 * size.ranks)


def _takes_interleaved(size: ScheduleSize) -> bool:
    """Whether groups are whole, but for a last one that is no smaller than the number of ranks."""
    group = size.group or size.ranks
    rest = size.microbatches % group
    return size.microbatches >= group and (rest == 0 or rest >= size.ranks)


SCHEDULES = {
    "gpipe": ScheduleKind("GPipe", _by_rank(order_gpipe)),
    "1f1b": ScheduleKind("1F1B", _by_rank(order_1f1b)),
    "interleaved": ScheduleKind(
        "interleaved 1F1B",
        _by_rank(order_interleaved),
        chunks=(2, None),
        takes=_takes_interleaved,
        rule="groups of {group}, and a last one of none or at least {ranks}",
    ),
    "zb-h1": ScheduleKind("ZB-H1", _by_rank(order_zb_h1), split_backward=True),
    "zb-2p": ScheduleKind("ZB-2P", partial(_generate, ZB_2P), generated=True, split_backward=True),
    "zbv": ScheduleKind("ZBV", partial(_generate, ZBV), "v", (2, 2), generated=True, split_backward=True),
    "dualpipev": ScheduleKind(
        "DualPipeV",
        _by_rank(order_dualpipev),
        "v",
        (2, 2),
        split_backward=True,
        overlapping=True,
        takes=lambda size: size.microbatches >= 2 * size.ranks,
        rule="at least 2 × {ranks} ranks",
    ),
}
"""Simplest first: between equals, `mt plan` recommends the earlier one."""


def get_size(config: RunConfig, microbatches: int) -> ScheduleSize:
    """The size of a run's schedule in a step of so many microbatches."""
    keys = config.pipeline
    chunks = keys.virtual_stages or SCHEDULES[keys.schedule].chunks[0]
    return ScheduleSize(config.parallel.pipeline, microbatches, chunks, keys.microbatch_group_size, keys.pass_times)


def get_placement(config: RunConfig) -> Placement:
    """Which rank of a run has which stages."""
    size = get_size(config, 1)
    return Placement(size.ranks, size.chunks, SCHEDULES[config.pipeline.schedule].shape)


def build_schedule(name: str, size: ScheduleSize) -> Schedule:
    """The lists of all ranks; `MtError` names everything that the schedule does not take, and what it would."""
    raise_if(list_problems(name, size))
    kind = SCHEDULES[name]
    placement = Placement(size.ranks, size.chunks, kind.shape)
    return Schedule(name, placement, size.microbatches, kind.order(size, placement))


def list_problems(name: str, size: ScheduleSize, *, samples: int | None = None) -> Iterator[Problem]:
    """What keeps a schedule from having a size, by the keys of a run's configuration.

    `samples` are those of a microbatch on all data ranks; with them, counts that pass are told as global batches too.
    """
    if name not in SCHEDULES:
        yield Problem("pipeline.schedule", f"unknown schedule {name!r}", did_you_mean(name, SCHEDULES))
        return
    kind, wrong = SCHEDULES[name], list(list_chunk_problems(name, size))
    yield from wrong
    if not wrong and not kind.takes(size):
        counts = find_nearest_counts(name, size)
        allowed = f"allowed: {' or '.join(map(str, counts))} microbatches"
        if samples:
            allowed += f", batch.global_batch = {' or '.join(str(number * samples) for number in counts)}"
        rule = kind.rule.format(ranks=size.ranks, group=size.group or size.ranks)
        yield Problem("batch.global_batch", f"{size.microbatches} microbatches, but {name} needs {rule}", allowed)


def find_nearest_counts(name: str, size: ScheduleSize) -> list[int]:
    """The numbers of microbatches next to the size's, one below and one above, that the schedule takes."""

    def takes(number: int) -> bool:
        return SCHEDULES[name].takes(ScheduleSize(size.ranks, number, size.chunks, size.group))

    below = islice(filter(takes, range(size.microbatches - 1, 0, -1)), 1)
    return [*below, next(filter(takes, count(size.microbatches + 1)))]


def list_chunk_problems(name: str, size: ScheduleSize) -> Iterator[Problem]:
    """What keeps a schedule from having a size, whatever its number of microbatches."""
    fewest, most = SCHEDULES[name].chunks
    if size.chunks < fewest or (most and size.chunks > most):
        numbers = f"{fewest}" if most == fewest else f"{fewest} or more"
        reason = f"{size.chunks}, but a rank of {name} has {numbers}"
        yield Problem("pipeline.virtual_stages", reason, f"allowed: {numbers}")
    yield from _list_time_problems(name, size)
    if size.group is None:
        return
    if name != "interleaved":
        reason = f"{size.group}, but {name} has no groups of microbatches"
        yield Problem("pipeline.microbatch_group_size", reason, 'leave it unset, or pipeline.schedule = "interleaved"')
    elif size.group < size.ranks:
        reason = f"{size.group} is less than parallel.pipeline {size.ranks}"
        yield Problem("pipeline.microbatch_group_size", reason, f"allowed: {size.ranks} and more")


def _list_time_problems(name: str, size: ScheduleSize) -> Iterator[Problem]:
    """Why a schedule cannot follow the times of passes."""
    if size.pass_times is None:
        return
    key, stages, given = "pipeline.pass_times", size.ranks * size.chunks, len(size.pass_times)
    if not SCHEDULES[name].generated:
        names = " or ".join(f'"{each}"' for each, kind in SCHEDULES.items() if kind.generated)
        yield Problem(key, f"are given, but the order of {name} is fixed", f"leave them out, or schedule = {names}")
    elif given != stages:
        yield Problem(key, f"{given} stages, but there are {stages}", f"give {stages} times three numbers")
    elif any(each[0] <= 0 or min(each) < 0 for each in size.pass_times):
        wrong = next(str([*each]) for each in size.pass_times if each[0] <= 0 or min(each) < 0)
        yield Problem(key, f"{wrong} for a stage", "allowed: a forward pass above 0, and two times that are not below")
