"""Runs a schedule: one `match` over a rank's operations, its passes and the messages among them.

What a pass computes is the caller's business. Here are the tensors between stages: each stage differentiates its own
part of the graph, from the gradients of its outputs to those of its inputs.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mt_core.contracts import EdgeTensor
from mt_core.parallel.pipeline.cut import Pipeline
from mt_core.pipeline.actions import Action, Placement, Schedule
from mt_core.pipeline.transfers import Message, Receive, Send, order_operations

Edge = Mapping[str, Tensor]


class StageWork(Protocol):
    """What the passes of a step compute."""

    def forward(self, stage: int, microbatch: int, edge: Edge) -> tuple[Edge, Tensor | None]:
        """Pass a micro-batch through a stage: what the next stage gets, or the last one's loss to differentiate."""
        ...

    def edge_tensors(self, stage: int, microbatch: int) -> Mapping[str, EdgeTensor]:
        """The tensors that a stage passes on of a micro-batch, as this rank has them."""
        ...

    def begin_pass(self, action: Action, *, last: bool) -> None:
        """A pass begins; `last` if no other backward pass of this rank follows."""
        ...

    def finish_chunk(self, chunk: int) -> None:
        """The last backward pass through a chunk has ended."""
        ...


@dataclass(slots=True)
class _Saved:
    """A stage's part of a micro-batch's graph."""

    inputs: dict[str, Tensor]
    outputs: Edge
    loss: Tensor | None


class ScheduleRun:
    """The passes of one step on this rank."""

    def __init__(self, pipeline: Pipeline, work: StageWork) -> None:
        self.pipeline, self.work = pipeline, work
        self.saved: dict[tuple[int, int], _Saved] = {}
        self.made: dict[Message, Edge] = {}
        """Messages that are still to be sent, or that another stage of this rank takes."""

    def run(self, schedule: Schedule) -> None:
        """Do all passes of a step, forward and backward."""
        ranks = range(schedule.placement.ranks)
        passes = [[*schedule.list_passes(rank)] for rank in ranks]
        left = Counter(action.chunk for action in passes[self.pipeline.rank] if action.kind != "F")
        self.pipeline.channels.begin(self.work.edge_tensors)
        for operation in order_operations(passes, self.pipeline.placement)[self.pipeline.rank]:
            if not isinstance(operation, Action):
                self._exchange(operation)
                continue
            left[operation.chunk] -= operation.kind != "F"
            self.work.begin_pass(operation, last=not left.total())
            self._do(operation)
            if operation.kind != "F" and not left[operation.chunk]:
                self.work.finish_chunk(operation.chunk)
        self.pipeline.channels.finish()
        assert not self.saved, f"{[*self.saved]} wait for their backward pass"

    def _do(self, action: Action) -> None:
        match action:
            case Action("F", microbatch, chunk):
                self._forward(microbatch, chunk)
            case Action("B", microbatch, chunk):
                self._backward(microbatch, chunk)
            case Action("I", microbatch, chunk):
                with self.pipeline.postponed.postpone((microbatch, chunk)):
                    self._backward(microbatch, chunk)
            case Action("W", microbatch, chunk):
                self.pipeline.postponed.compute((microbatch, chunk))

    def _exchange(self, operation: Send | Receive) -> None:
        match operation:
            case Send(message):
                self.pipeline.channels.send(message, self.made.pop(message))
            case Receive(message):
                self.pipeline.channels.ask(message)

    @torch.no_grad()
    def evaluate(self, microbatches: int) -> None:
        """Pass micro-batches through all stages, forward only."""
        order = order_forward(self.pipeline.placement, microbatches)
        self.pipeline.channels.begin(self.work.edge_tensors)
        passes = [order] * self.pipeline.placement.ranks
        for operation in order_operations(passes, self.pipeline.placement)[self.pipeline.rank]:
            if isinstance(operation, Action):
                self.work.begin_pass(operation, last=False)
                self._do(operation)
                self.saved.clear()
            else:
                self._exchange(operation)
        self.pipeline.channels.finish()

    def _forward(self, microbatch: int, chunk: int) -> None:
        stage = self.pipeline.placement.get_stage(self.pipeline.rank, chunk)
        inputs: dict[str, Tensor] = {}
        if stage:
            received = self._receive(Message("features", stage - 1, microbatch))
            inputs = {name: tensor.detach().requires_grad_() for name, tensor in received.items()}
        outputs, loss = self.work.forward(stage, microbatch, inputs)
        self.saved[microbatch, chunk] = _Saved(inputs, outputs, loss)
        if stage + 1 < self.pipeline.placement.stages:
            self.made[Message("features", stage, microbatch)] = outputs

    def _backward(self, microbatch: int, chunk: int) -> None:
        stage, saved = self.pipeline.placement.get_stage(self.pipeline.rank, chunk), self.saved.pop((microbatch, chunk))
        if saved.loss is not None:
            saved.loss.backward()
        else:
            received = self._receive(Message("gradients", stage + 1, microbatch))
            pairs = [(saved.outputs[name], g) for name, g in received.items() if saved.outputs[name].requires_grad]
            if pairs:  # a first stage whose weights are all frozen has nothing to differentiate
                torch.autograd.backward([output for output, _ in pairs], [g for _, g in pairs])
        if stage:
            gradients = {
                name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                for name, tensor in saved.inputs.items()
            }
            self.made[Message("gradients", stage, microbatch)] = gradients

    def _receive(self, message: Message) -> Edge:
        if self.pipeline.channels.is_local(message):
            return self.made.pop(message)
        return self.pipeline.channels.receive(message)


def order_forward(placement: Placement, microbatches: int) -> list[Action]:
    """The forward passes of an evaluation, the same on every rank: as many micro-batches as there are ranks pass
    through one chunk, then through the next."""
    return [
        Action("F", number, chunk)
        for start in range(0, microbatches, placement.ranks)
        for chunk in range(placement.chunks)
        for number in range(start, min(start + placement.ranks, microbatches))
    ]
