"""Zero-bubble schedules, generated: in every unit of time each rank does the most urgent pass that is ready.

The papers find ZB-2P and ZBV by search. A fixed order of urgency and a limit of memory do as well: with forward, input
and weight passes of one length the step ends at the earliest moment that there can be, when the rank that starts last
has worked without a pause (`tests/core/pipeline/test_bubbles.py` compares over 16 ranks and 64 microbatches).
Passes of unequal length are ordered by their times as they become ready, where those are given and shorten the step.
Nothing is random or measured, so every rank computes the same schedule.
"""

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush

from mt_core.pipeline.actions import Action, PassKind, Placement, Schedule, Step
from mt_core.pipeline.simulator import StageCosts, simulate

StepsByRank = tuple[tuple[Step, ...], ...]

Urgency = Sequence[tuple[PassKind, int]]
"""Kinds of passes with their chunks, the most urgent first."""
ZB_2P: Urgency = (("I", 0), ("F", 0), ("W", 0))
"""Weight gradients fill what would be waiting."""
ZBV: Urgency = (("F", 1), ("I", 0), ("W", 0), ("I", 1), ("F", 0), ("W", 1))
"""What is nearest to its end goes first: forward passes on their way back, then the backward passes that set memory
free. Of all 720 orders this was among the best with equal passes, and the best of those with unequal ones."""


PassTimes = tuple[float, float, float]
"""Times of a stage's forward, input and weight pass, in any unit."""
UNIT: PassTimes = (1, 1, 1)


def generate_steps(
    placement: Placement,
    microbatches: int,
    urgency: Urgency,
    *,
    most_live: int,
    times: Sequence[PassTimes] | None = None,
    reserved: int = 0,
) -> StepsByRank | None:
    """Each rank's list, where no rank has more than `most_live` microbatches between their F and W, over its chunks.

    `times` are those of each stage; without them all passes are equally long. For each later chunk of a rank, forward
    passes leave room for `reserved` microbatches. None if ranks fill up with forward passes that cannot go on, which
    passes of unequal length may do where no room is reserved.
    """
    progress = _Progress(placement, microbatches, most_live, reserved)
    each_time = times or [UNIT] * placement.stages
    seconds: list[dict[PassKind, float]] = [dict(zip(("F", "I", "W"), each, strict=True)) for each in each_time]
    steps: list[list[Step]] = [[] for _ in range(placement.ranks)]
    idle, running, now = [*range(placement.ranks)], list[tuple[float, int, Action]](), 0.0
    while not progress.complete:
        for rank in idle:
            if action := progress.choose(rank, urgency):
                steps[rank].append(action)
                stage = placement.get_stage(rank, action.chunk)
                heappush(running, (now + seconds[stage][action.kind], rank, action))
        if not running:
            return None
        now = running[0][0]
        while running and running[0][0] == now:
            _, rank, action = heappop(running)
            progress.finish(rank, action)
        busy = {rank for _, rank, _ in running}
        idle = [rank for rank in range(placement.ranks) if rank not in busy]
    return tuple(map(tuple, steps))


def fit_steps(
    placement: Placement, microbatches: int, urgency: Urgency, times: Sequence[PassTimes] | None, *, most_live: int
) -> StepsByRank:
    """The lists for passes of one length or, by these times of each stage, shorter ones if there are any."""
    fixed = generate_steps(placement, microbatches, urgency, most_live=most_live)
    assert fixed, f"no rank can go on with {most_live} live microbatches"
    if times is None:
        return fixed
    costs = [StageCosts(*each) for each in times]
    fitted = (
        generate_steps(placement, microbatches, urgency, most_live=most_live, times=times, reserved=reserved)
        for reserved in ((0, 1) if placement.chunks > 1 else (0,))
    )
    lists = [fixed, *(steps for steps in fitted if steps)]
    return min(lists, key=lambda steps: simulate(Schedule("", placement, microbatches, steps), costs).seconds)


class _Progress:
    """Passes of each kind that each stage has done; microbatches go through every stage in their order."""

    def __init__(self, placement: Placement, microbatches: int, most_live: int, reserved: int) -> None:
        self.placement, self.microbatches = placement, microbatches
        self.room = [most_live - reserved * (placement.chunks - 1 - chunk) for chunk in range(placement.chunks)]
        """Microbatches of a rank with which a forward pass through each chunk may not begin any more."""
        self.counts: dict[PassKind, list[int]] = {kind: [0] * placement.stages for kind in ("F", "I", "W")}

    @property
    def complete(self) -> bool:
        """Whether the weight gradients of every stage, which come last, are done."""
        return min(self.counts["W"]) == self.microbatches

    def choose(self, rank: int, urgency: Urgency) -> Action | None:
        """The most urgent pass of a rank whose inputs are there; None if it has to wait."""
        live = self._count_live(rank)
        for kind, chunk in urgency:
            stage = self.placement.get_stage(rank, chunk)
            index = self.counts[kind][stage]
            if not (kind == "F" and live >= self.room[chunk]) and all(
                index < count for count in self._count_inputs(kind, stage)
            ):
                return Action(kind, index, chunk)
        return None

    def finish(self, rank: int, action: Action) -> None:
        """Count a pass as done."""
        self.counts[action.kind][self.placement.get_stage(rank, action.chunk)] += 1

    def _count_live(self, rank: int) -> int:
        stages = self.placement.get_stages(rank)
        return sum(self.counts["F"][stage] - self.counts["W"][stage] for stage in stages)

    def _count_inputs(self, kind: PassKind, stage: int) -> Iterator[int]:
        """How many microbatches each input of a pass is there for."""
        match kind:
            case "F":
                yield self.counts["F"][stage - 1] if stage else self.microbatches
            case "I":
                yield self.counts["F"][stage]
                if stage + 1 < self.placement.stages:
                    yield self.counts["I"][stage + 1]
            case _:
                yield self.counts["I"][stage]
