"""A schedule, played through: when each action runs, where ranks wait, and how much they hold at most.

Every rank does its list in order and starts an action when its inputs are there. Times are those of stages, so stages
may be uneven; a tensor that goes to another rank arrives `send` later, beside the arithmetic of both. What waits for
something that nobody does, or that is done too late by a rank which waits itself, is reported as a deadlock.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import get_args

from mt_core.errors import Problem, raise_if
from mt_core.pipeline.actions import Action, PassKind, Placement, Schedule, Step

Result = tuple[str, int, int]
"""What a pass makes: "F" features, "I" the gradient of its input or "W" of its weights; its stage and microbatch."""


@dataclass(frozen=True, slots=True)
class StageCosts:
    """What a stage takes for one microbatch, in any unit of time and of memory."""

    forward: float = 1
    backward_input: float = 1
    backward_weight: float = 1
    activations: float = 1
    """Memory from the forward pass to the end of the backward pass."""
    weight_part: float = 1
    """What the weight pass needs when the input pass is done, as a share of it; above 1 if that pass recomputes it."""

    def get_seconds(self, kind: PassKind) -> float:
        """How long a pass runs."""
        both = self.backward_input + self.backward_weight
        return {"F": self.forward, "B": both, "I": self.backward_input, "W": self.backward_weight}[kind]

    def get_freed(self, kind: PassKind) -> float:
        """Memory that is free again when a pass is done."""
        kept = self.activations * self.weight_part
        return {"F": 0, "B": self.activations, "I": self.activations - kept, "W": kept}[kind]


@dataclass(frozen=True, slots=True)
class Event:
    """An action and when it runs."""

    step: Step
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """A schedule with times; the step begins at 0."""

    schedule: Schedule
    events: tuple[tuple[Event, ...], ...]
    """The events of each rank, in order."""
    peak_activations: tuple[float, ...]
    """The most that each rank holds at once."""

    @property
    def seconds(self) -> float:
        """From the first begin to the last end."""
        return max(events[-1].end for events in self.events)

    @property
    def work(self) -> tuple[float, ...]:
        """Time that each rank computes."""
        return tuple(sum(event.end - event.start for event in events) for events in self.events)

    @property
    def bubble(self) -> float:
        """Time that ranks wait ÷ time that they compute, over all ranks: (p − 1) / m for 1F1B with even stages."""
        return self.seconds * len(self.events) / sum(self.work) - 1

    @property
    def paused(self) -> float:
        """The longest that a rank waits between its own first begin and last end.

        Papers on zero bubbles count this alone, since their steps need not end on all ranks at once.
        """
        spans = (events[-1].end - events[0].start for events in self.events)
        return max(span - work for span, work in zip(spans, self.work, strict=True))


def simulate(
    schedule: Schedule, costs: Sequence[StageCosts] | None = None, *, send: float = 0, overlap: float = 0
) -> Timeline:
    """Play a schedule through with the costs of its stages, by default so that each rank's add up to 1 of everything.

    `send` is the time of one tensor between two ranks. Of a forward and a backward pass that run together, the share
    `overlap` of the shorter one takes no time. `MtError` says what is missing or twice there, and who waits for what.
    """
    raise_if(list_faults(schedule))
    placement = schedule.placement
    if costs is None:
        part = 1 / placement.chunks
        costs = [StageCosts(part, part, part, part)] * placement.stages
    run = _Run(schedule, costs, send, overlap)
    run.play()
    raise_if(run.list_deadlocked())
    return Timeline(schedule, tuple(map(tuple, run.events)), tuple(run.peaks))


def list_faults(schedule: Schedule) -> Iterator[Problem]:
    """Passes that a schedule leaves out, repeats or does not know: each is needed once per chunk and microbatch."""
    chunks = schedule.placement.chunks
    wanted = set(product(("F", "I", "W"), range(schedule.microbatches), range(chunks)))
    for rank in range(schedule.placement.ranks):
        counts = Counter(
            (kind, action.microbatch, action.chunk)
            for action in schedule.list_passes(rank)
            for kind in (("I", "W") if action.kind == "B" else (action.kind,))
        )
        where = f"schedule {schedule.name}, rank {rank}"
        for kind, index, chunk in sorted(wanted - counts.keys()):
            yield Problem(where, f"{kind} of microbatch {index}, chunk {chunk} is missing", "every pass is done once")
        for (kind, index, chunk), number in sorted(counts.items()):
            if (kind, index, chunk) not in wanted:
                limits = f"allowed: microbatches 0 to {schedule.microbatches - 1}, chunks 0 to {chunks - 1}"
                yield Problem(where, f"{kind} of microbatch {index}, chunk {chunk} does not exist", limits)
            elif number > 1:
                reason = f"{kind} of microbatch {index}, chunk {chunk} is there {number} times"
                yield Problem(where, reason, "every pass is done once")


def list_inputs(action: Action, stage: int, stages: int) -> Iterator[Result]:
    """What must be there before a pass through a stage begins."""
    index = action.microbatch
    match action.kind:
        case "F":
            if stage:
                yield "F", stage - 1, index
        case "W":
            yield "I", stage, index
        case _:
            yield "F", stage, index
            if stage + 1 < stages:
                yield "I", stage + 1, index


class _Run:
    """Ranks at their places in the lists, and what is done so far."""

    def __init__(self, schedule: Schedule, costs: Sequence[StageCosts], send: float, overlap: float) -> None:
        self.schedule, self.send, self.overlap = schedule, send, overlap
        placement, kinds = schedule.placement, get_args(PassKind)
        self.stages = [placement.get_stages(rank) for rank in range(placement.ranks)]
        self.ranks = [placement.get_rank(stage) for stage in range(placement.stages)]
        self.seconds = [{kind: each.get_seconds(kind) for kind in kinds} for each in costs]
        self.taken = [each.activations for each in costs]
        self.freed = [{kind: each.get_freed(kind) for kind in kinds} for each in costs]
        self.ends: dict[Result, float] = {}
        self.waiting: dict[Result, list[int]] = {}
        self.events: list[list[Event]] = [[] for _ in range(placement.ranks)]
        self.live, self.peaks = [0.0] * placement.ranks, [0.0] * placement.ranks

    def play(self) -> None:
        """Let every rank go on until all are done or wait."""
        able = deque(range(self.schedule.placement.ranks))
        while able:
            rank = able.popleft()
            steps, events, stages = self.schedule.steps[rank], self.events[rank], self.stages[rank]
            while len(events) < len(steps):
                step = steps[len(events)]
                passes = [(stages[action.chunk], action) for action in step.passes]
                inputs = [each for stage, action in passes for each in list_inputs(action, stage, len(self.ranks))]
                if missing := next((result for result in inputs if result not in self.ends), None):
                    self.waiting.setdefault(missing, []).append(rank)
                    break
                events.append(self._run(rank, step, passes, inputs))
                for result in self._finish(passes, events[-1].end):
                    able.extend(self.waiting.pop(result, ()))

    def _run(self, rank: int, step: Step, passes: list[tuple[int, Action]], inputs: list[Result]) -> Event:
        """Run a step as soon as rank and inputs allow."""
        start = self.events[rank][-1].end if self.events[rank] else 0.0
        for result in inputs:
            arrival = self.ends[result] + (self.send if self.ranks[result[1]] != rank else 0)
            start = max(start, arrival)
        times = [self.seconds[stage][action.kind] for stage, action in passes]
        end = start + sum(times) - (self.overlap * min(times) if len(times) > 1 else 0)
        self._count_memory(rank, passes)
        return Event(step, start, end)

    def _finish(self, passes: list[tuple[int, Action]], end: float) -> list[Result]:
        """Note that the results of passes are there, and return which they are."""
        results: list[Result] = []
        for stage, action in passes:
            kinds = ("I", "W") if action.kind == "B" else (action.kind,)
            results += [(kind, stage, action.microbatch) for kind in kinds]
        self.ends.update(dict.fromkeys(results, end))
        return results

    def _count_memory(self, rank: int, passes: list[tuple[int, Action]]) -> None:
        """What forward passes make is there while backward passes of the same step still need theirs."""
        live = self.live[rank] + sum([self.taken[stage] for stage, action in passes if action.kind == "F"])
        freed = sum([self.freed[stage][action.kind] for stage, action in passes])
        self.live[rank] = live - freed
        self.peaks[rank] = max(self.peaks[rank], live, live - freed)

    def list_deadlocked(self) -> Iterator[Problem]:
        """Who waits for what, if anyone does."""
        for (kind, stage, index), ranks in sorted(self.waiting.items(), key=lambda item: item[1]):
            for rank in ranks:
                number = len(self.events[rank])
                other = self.schedule.placement.get_rank(stage)
                actual = f"deadlock: step {number}, {self.schedule.steps[rank][number]}, waits for "
                actual += f"{kind} of microbatch {index} through stage {stage}"
                position = self._find_step(other, kind, stage, index)
                yield Problem(
                    f"schedule {self.schedule.name}, rank {rank}",
                    f"{actual}, which rank {other} does in step {position}",
                    f"rank {other} is at step {len(self.events[other])}; change the order of one of the two",
                )

    def _find_step(self, rank: int, kind: str, stage: int, index: int) -> int:
        """Where in a rank's list a result is made."""
        placement: Placement = self.schedule.placement
        return next(
            number
            for number, step in enumerate(self.schedule.steps[rank])
            for action in step.passes
            if (action.microbatch, placement.get_stage(rank, action.chunk)) == (index, stage)
            and (action.kind == kind or (action.kind == "B" and kind != "F"))
        )
