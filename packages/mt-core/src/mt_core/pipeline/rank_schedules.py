"""Schedules that are written down by hand: each rank's list is a function of its number alone.

Sources: GPipe (Huang et al. 2019); 1F1B (PipeDream-flush, Narayanan et al. 2021a); interleaved 1F1B (Narayanan et al.
2021b; docs/specs/core.md §3.3); ZB-H1 (Qi et al. 2023, "Zero Bubble Pipeline Parallelism"); DualPipeV (DeepSeek's
DualPipe, cut in half; docs/specs/core.md §3.9).
"""

from collections import deque
from dataclasses import dataclass

from mt_core.pipeline.actions import Action, Overlap, PassKind, Step


@dataclass(frozen=True, slots=True)
class ScheduleSize:
    """What a schedule is made for."""

    ranks: int
    microbatches: int
    chunks: int = 1
    """Stages of each rank."""
    group: int | None = None
    """Microbatches that pass through a chunk before the next chunk's turn comes, if interleaved; unset, one a rank."""
    pass_times: tuple[tuple[float, float, float], ...] | None = None
    """Times of every stage's forward, input and weight pass, for schedules that are generated."""


def order_gpipe(rank: int, size: ScheduleSize) -> list[Step]:
    """All forward passes, then all backward passes."""
    return [Action(kind, index) for kind in ("F", "B") for index in range(size.microbatches)]


def order_1f1b(rank: int, size: ScheduleSize) -> list[Step]:
    """One forward, one backward, after as many forward passes as there are ranks behind this one."""
    count = size.microbatches
    forward, backward = ([Action(kind, index) for index in range(count)] for kind in ("F", "B"))
    return _alternate(forward, backward, warmup=size.ranks - rank - 1)


def order_interleaved(rank: int, size: ScheduleSize) -> list[Step]:
    """1F1B over several chunks: groups of microbatches pass through one chunk after the other.

    The last group may be smaller; backward passes take the microbatches in the same order and the chunks in reverse.
    """
    group, last = size.group or size.ranks, size.chunks - 1
    order = [
        (index, chunk)
        for start in range(0, size.microbatches, group)
        for chunk in range(size.chunks)
        for index in range(start, min(start + group, size.microbatches))
    ]
    forward = [Action("F", index, chunk) for index, chunk in order]
    backward = [Action("B", index, last - chunk) for index, chunk in order]
    return _alternate(forward, backward, warmup=(size.ranks - rank - 1) * 2 + last * group)


def _alternate(forward: list[Action], backward: list[Action], *, warmup: int) -> list[Step]:
    """Some forward passes first, then by turns forward and backward, then the backward passes that are left."""
    pairs = zip(forward[warmup:], backward, strict=False)
    rest = backward[max(len(forward) - warmup, 0) :]
    return [*forward[:warmup], *(action for pair in pairs for action in pair), *rest]


def order_zb_h1(rank: int, size: ScheduleSize) -> list[Step]:
    """1F1B whose weight gradients lag behind by the rank's number, so that they fill the end of the step.

    No rank holds the activations of more microbatches than the first one of 1F1B.
    """
    count, warmup = size.microbatches, size.ranks - rank - 1
    steps: list[Step] = [Action("F", index) for index in range(min(warmup, count))]
    for index in range(count):
        if warmup + index < count:
            steps.append(Action("F", warmup + index))
        steps.append(Action("I", index))
        if index >= rank:
            steps.append(Action("W", index - rank))
    return [*steps, *(Action("W", index) for index in range(max(count - rank, 0), count))]


def order_dualpipev(rank: int, size: ScheduleSize) -> list[Step]:
    """Two chunks in V shape, fed from one end: forward passes of one run together with backward passes of the other.

    The eight phases are those of docs/specs/core.md §3.9.
    """
    after, own, turn = size.ranks - rank - 1, rank + 1, _Turn()
    steps: list[Step] = [turn.run("F", 0) for _ in range(2 * after)]
    for _ in range(own):
        steps += [turn.run("F", 0), turn.run("F", 1)]
    for _ in range(after):
        steps += [turn.run("I", 1), turn.run_waiting(), turn.run("F", 1)]
    for _ in range(size.microbatches - 2 * size.ranks + own):
        steps += [turn.overlap(0, 1), turn.overlap(1, 0)]
    for _ in range(after):
        steps += [turn.run("B", 1), turn.overlap(1, 0)]
    for number in range(2 * own):
        steps.append(turn.run("B" if number < own else "I", 1 - number % 2))
    for _ in range(after):
        steps += [turn.run_waiting(), turn.run("I", 0)]
    return [*steps, *(turn.run_waiting() for _ in range(own))]


class _Turn:
    """Counts the microbatches of each chunk, forward and backward, and keeps the weight gradients that wait."""

    def __init__(self) -> None:
        self.forward, self.backward = [0, 0], [0, 0]
        self.waiting: deque[Action] = deque()

    def run(self, kind: PassKind, chunk: int) -> Action:
        """The next pass of a kind through a chunk."""
        counts = self.forward if kind == "F" else self.backward
        action = Action(kind, counts[chunk], chunk)
        counts[chunk] += 1
        if kind == "I":
            self.waiting.append(Action("W", action.microbatch, chunk))
        return action

    def overlap(self, forward: int, backward: int) -> Overlap:
        """The next forward pass through one chunk together with the next backward pass through another."""
        return Overlap(self.run("F", forward), self.run("B", backward))

    def run_waiting(self) -> Action:
        """The weight gradients that have waited longest."""
        return self.waiting.popleft()
