"""Zero-bubble schedules, generated: in every unit of time each rank does the most urgent pass that is ready.

The papers find ZB-2P and ZBV by search. A fixed order of urgency and a limit of memory do as well: with forward, input
and weight passes of one length the step ends at the earliest moment that there can be, when the rank that starts last
has worked without a pause (`tests/core/pipeline/test_bubbles.py` compares over 16 ranks and 64 microbatches).
Nothing is random or measured, so every rank computes the same schedule.
"""

from collections.abc import Iterator, Sequence

from mt_core.pipeline.actions import Action, PassKind, Placement, Step

Urgency = Sequence[tuple[PassKind, int]]
"""Kinds of passes with their chunks, the most urgent first."""
ZB_2P: Urgency = (("I", 0), ("F", 0), ("W", 0))
"""Weight gradients fill what would be waiting."""
ZBV: Urgency = (("F", 1), ("I", 0), ("W", 0), ("I", 1), ("F", 0), ("W", 1))
"""What is nearest to its end goes first: forward passes on their way back, then the backward passes that set memory
free. Of all 720 orders this was among the best with equal passes, and the best of those with unequal ones."""


def generate_steps(
    placement: Placement, microbatches: int, urgency: Urgency, *, most_live: int
) -> tuple[tuple[Step, ...], ...]:
    """Each rank's list, where no rank has more than `most_live` microbatches between their F and W, over its chunks."""
    progress = _Progress(placement, microbatches)
    steps: list[list[Step]] = [[] for _ in range(placement.ranks)]
    while not progress.complete:
        chosen = [progress.choose(rank, urgency, most_live) for rank in range(placement.ranks)]
        assert any(chosen), f"no rank can go on with {most_live} live microbatches"
        for rank, action in enumerate(chosen):
            if action is not None:
                progress.finish(rank, action)
                steps[rank].append(action)
    return tuple(map(tuple, steps))


class _Progress:
    """Passes of each kind that each stage has done; microbatches go through every stage in their order."""

    def __init__(self, placement: Placement, microbatches: int) -> None:
        self.placement, self.microbatches = placement, microbatches
        self.counts: dict[PassKind, list[int]] = {kind: [0] * placement.stages for kind in ("F", "I", "W")}

    @property
    def complete(self) -> bool:
        """Whether the weight gradients of every stage, which come last, are done."""
        return min(self.counts["W"]) == self.microbatches

    def choose(self, rank: int, urgency: Urgency, most_live: int) -> Action | None:
        """The most urgent pass of a rank whose inputs are there; None if it has to wait."""
        full = self._count_live(rank) >= most_live
        for kind, chunk in urgency:
            stage = self.placement.get_stage(rank, chunk)
            index = self.counts[kind][stage]
            if not (kind == "F" and full) and all(index < count for count in self._count_inputs(kind, stage)):
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
