"""The timeline of a step: when a GPU computes and when it waits for which collective, and so how long the step takes.

Within a micro-batch, layers alternate between arithmetic and the collectives that nothing hides. A hidden collective
runs beside arithmetic and costs only what it is longer, and, if it works in buckets or units, one of them. That it
takes a part of the GPU's processors meanwhile is left out.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mt_core.config.run_config import PlannedRun
from mt_core.parallel.layout import Layout
from mt_core.planning.communication import Transfer, micro_batches, transfers
from mt_core.planning.compute import Compute, compute
from mt_core.planning.gpu_profile import Profile
from mt_core.planning.parameters import count_parameters

Lane = Literal["compute", "tensor", "context", "expert", "data"]
PIECES = 16
"""Alternations of arithmetic and waiting that a step is drawn with, spread over its micro-batches."""


@dataclass(frozen=True, slots=True)
class Span:
    """Something that runs from `start` to `end`, in seconds from the step's begin."""

    lane: str
    name: str
    start: float
    end: float
    hidden: bool = False
    """A collective that runs beside arithmetic."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """A predicted step."""

    seconds: float
    spans: tuple[Span, ...]
    parts: dict[str, float]
    """Seconds by what they go to; they add up to the step."""


class _Line:
    """The timeline as it grows."""

    def __init__(self) -> None:
        self.now = 0.0
        self.spans: list[Span] = []
        self.waited: defaultdict[str, float] = defaultdict(float)

    def run(self, lane: str, name: str, seconds: float) -> None:
        """Let time pass; on any lane but `compute`, arithmetic waits."""
        if seconds > 0:
            self.spans.append(Span(lane, name, self.now, self.now + seconds))
            self.now += seconds
            if lane != "compute":
                self.waited[lane] += seconds

    def wait_until(self, lane: str, end: float) -> None:
        """Arithmetic stands still until a hidden collective has ended."""
        self.waited[lane] += max(end - self.now, 0.0)
        self.now = max(self.now, end)


def step_time(config: PlannedRun, layout: Layout, profile: Profile) -> StepTime:
    """The step of one GPU; all are alike."""
    work, moved, line = compute(config, layout, profile), transfers(config, layout), _Line()
    count, bucket = micro_batches(config, layout), _get_bucket_share(config, layout)
    pieces = max(1, min(config.model.layers, PIECES // count))
    gathered = _gather(line, moved, profile, bucket=bucket)
    backward_from = 0.0
    for index in range(count):
        _phase(line, "forward", work, moved, profile, pieces)
        if index == 0 and gathered:  # the layers of the last bucket start when it has come
            line.wait_until("data", gathered + work.forward * bucket)
        backward_from = line.now
        _phase(line, "backward", work, moved, profile, pieces)
    _reduce(line, moved, profile, begun=backward_from, bucket=bucket)
    line.run("compute", "optimizer", work.optimizer)
    return StepTime(line.now, tuple(line.spans), divide_work(work, count, line.waited))


@dataclass(frozen=True, slots=True)
class Passes:
    """Seconds of one micro-batch through the layers of a configuration, waiting for collectives included."""

    forward: float
    backward_input: float
    backward_weight: float
    """The products that make the weights' gradients, and adding those up."""
    waited: Mapping[str, float]
    """Seconds of both directions that arithmetic waits for the collectives of each axis."""

    @property
    def seconds(self) -> float:
        """Seconds of both directions."""
        return self.forward + self.backward_input + self.backward_weight


def predict_passes(config: PlannedRun, layout: Layout, profile: Profile) -> Passes:
    """The passes of one micro-batch, outside of what comes once a step."""
    work, moved, line = compute(config, layout, profile), transfers(config, layout), _Line()
    _phase(line, "forward", work, moved, profile, 1)
    forward, weight = line.now, work.products + work.accumulate
    _phase(line, "backward", work, moved, profile, 1)
    return Passes(forward, line.now - forward - weight, weight, dict(line.waited))


@dataclass(frozen=True, slots=True)
class Sync:
    """Seconds of what comes once a step on a rank."""

    before: float
    """Until the first pass begins: updated weights."""
    after: float
    """From the last pass to the end: reductions of gradients, and the optimizer."""
    waited: Mapping[str, float]
    """Seconds of these that arithmetic waits for the collectives of each axis."""


def predict_sync(config: PlannedRun, layout: Layout, profile: Profile, passes: Passes) -> Sync:
    """What comes once a step, where the last backward pass is one of `passes`."""
    moved, bucket = transfers(config, layout), _get_bucket_share(config, layout)
    begin, end = _Line(), _Line()
    if gathered := _gather(begin, moved, profile, bucket=bucket):
        begin.wait_until("data", gathered + passes.forward * (bucket - 1))
    end.now = backward = passes.backward_input + passes.backward_weight
    _reduce(end, moved, profile, begun=0.0, bucket=bucket)
    waited = {axis: begin.waited[axis] + end.waited[axis] for axis in {**begin.waited, **end.waited}}
    return Sync(begin.now, end.now - backward + compute(config, layout, profile).optimizer, waited)


def _get_bucket_share(config: PlannedRun, layout: Layout) -> float:
    """The share of the parameters in one bucket; a parameter is in one bucket as a whole."""
    parameters = count_parameters(config.model, layout.dims.tensor, layout.dims.expert, layout.dims.expert_tensor)
    return min(1.0, max(layout.bucket_size, parameters.largest) / max(parameters.total, 1))


def _gather(line: _Line, moved: Sequence[Transfer], profile: Profile, *, bucket: float) -> float:
    """Updated weights come before the first pass, or their first bucket does; seconds of what runs beside it."""
    gathers = [t for t in moved if t.phase == "gather"]
    seconds = sum(t.seconds(profile) for t in gathers)
    if gathers and gathers[0].hidden:
        line.spans.append(Span("data", gathers[0].what, 0.0, seconds, hidden=True))
        line.wait_until("data", seconds * bucket)
        return seconds
    line.run("data", "updated weights", seconds)
    return 0.0


def _phase(
    line: _Line, phase: str, work: Compute, moved: Sequence[Transfer], profile: Profile, pieces: int
) -> None:  # fmt: skip
    """One micro-batch's forward or backward pass."""
    forward = phase == "forward"
    arithmetic = work.forward if forward else work.backward
    room = {
        "matrix products": work.products * (1 if forward else 2),
        "attention core": work.attention_forward if forward else work.attention_backward,
        f"{phase} pass": arithmetic,
    }
    waits: defaultdict[str, float] = defaultdict(float)
    beside: defaultdict[tuple[str, str], float] = defaultdict(float)
    for transfer in (t for t in moved if t.phase == phase):
        seconds = transfer.seconds(profile)
        if transfer.hidden:
            beside[transfer.axis, transfer.hidden] += seconds
            waits[transfer.axis] += seconds / transfer.calls if transfer.axis == "data" else 0.0  # first or last unit
        else:
            waits[transfer.axis] += seconds
    for (axis, behind), seconds in beside.items():
        waits[axis] += max(seconds - room[behind], 0.0)
    for _ in range(pieces):
        for (axis, behind), seconds in beside.items():
            end = line.now + min(seconds, room[behind]) / pieces
            line.spans.append(Span(axis, f"beside {behind}", line.now, end, hidden=True))
        line.run("compute", phase, arithmetic / pieces)
        for axis, seconds in waits.items():
            line.run(axis, phase, seconds / pieces)


def _reduce(line: _Line, moved: Sequence[Transfer], profile: Profile, *, begun: float, bucket: float) -> None:
    """Gradients are reduced bucket by bucket, beside the last backward pass where that is allowed."""
    reduces = [t for t in moved if t.phase == "reduce"]
    hidden = sum(t.seconds(profile) for t in reduces if t.hidden)
    if hidden:
        first = begun + (line.now - begun) * bucket
        end = max(first + hidden, line.now + hidden * bucket)
        line.spans.append(Span("data", "gradients", end - hidden, end, hidden=True))
        line.wait_until("data", end)
    for transfer in reduces:
        if not transfer.hidden:
            line.run(transfer.axis, "gradients", transfer.seconds(profile))


def divide_work(work: Compute, count: int, waited: Mapping[str, float]) -> dict[str, float]:
    """Seconds of a step by what they go to, of `count` micro-batches and of what is waited for."""
    parts = {
        "matrix products": 3 * work.products * count,
        "attention": (work.attention_forward + work.attention_backward) * count,
        "norms, activations, sums": (work.kernels_forward + work.kernels_backward) * count,
        "recompute": work.recompute * count,
        "loss": work.loss * count,
        "adding gradients up": work.accumulate * count,
        "optimizer": work.optimizer,
        **{f"waiting for {lane}": seconds for lane, seconds in waited.items()},
    }
    return {name: seconds for name, seconds in parts.items() if seconds}
