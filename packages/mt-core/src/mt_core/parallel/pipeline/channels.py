"""Messages between the ranks of a pipeline: the features of a micro-batch on the way forward, its gradients back.

There is a group of two ranks for each direction and each kind of message, so a channel carries messages one way only.
A receiver asks for them in the order in which the schedule makes the sender send them; then no order of what two ranks
do can make them wait for each other. Nothing is sent about shapes, which both sides know from the micro-batch.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mt_core.contracts import EdgeTensor
from mt_core.distributed.mesh import Axis, Mesh
from mt_core.pipeline.actions import Action, Placement

MessageKind = Literal["features", "gradients"]
AHEAD = 2
"""Messages of a channel that a rank asks for before it needs them."""
Shapes = Callable[[int, int], Mapping[str, EdgeTensor]]
"""What a stage passes on of a micro-batch: the tensors of a message with features, and of one with their gradients."""


class Message(NamedTuple):
    """What a stage makes of a micro-batch for another stage."""

    kind: MessageKind
    stage: int
    """The stage that sends it."""
    microbatch: int

    @property
    def target(self) -> int:
        """The stage that needs it."""
        return self.stage + (1 if self.kind == "features" else -1)

    @property
    def edge(self) -> int:
        """The stage whose features the message has, or has gradients of."""
        return min(self.stage, self.target)


def make_message(action: Action, stage: int) -> Message | None:
    """The message that a pass through a stage ends with, if the pass is of a kind that does."""
    match action.kind:
        case "F":
            return Message("features", stage, action.microbatch)
        case "B" | "I":
            return Message("gradients", stage, action.microbatch)
        case _:
            return None


class Route(NamedTuple):
    """A channel: its kind of messages, and the positions on the pipeline between which they travel."""

    kind: MessageKind
    source: int
    target: int


def list_routes(placement: Placement) -> list[Route]:
    """Every channel that a placement of stages needs, in one order for all ranks."""
    routes: set[Route] = set()
    for stage in range(placement.stages - 1):
        here, there = placement.get_rank(stage), placement.get_rank(stage + 1)
        if here != there:
            routes |= {Route("features", here, there), Route("gradients", there, here)}
    return sorted(routes)


@dataclass(slots=True)
class Incoming:
    """What a rank is to receive on a channel."""

    expected: deque[Message] = field(default_factory=deque)
    """In the sender's order, those that were not asked for yet."""
    asked: int = 0
    """Messages that were asked for, and not taken."""


class Channels:
    """This rank's channels."""

    def __init__(self, mesh: Mesh, placement: Placement, device: torch.device) -> None:
        """Connect all ranks, and open every channel for tensors on a device: NCCL's first message waits for both
        sides."""
        self.placement, self.rank, self.device = placement, mesh.pipeline.rank, device
        self.axes: dict[Route, Axis] = {}
        for route in list_routes(placement):
            axis = mesh.connect_stages("channel", sorted((route.source, route.target)))
            if axis.size > 1:
                self.axes[route] = axis
        for route, axis in self.axes.items():
            greeting = torch.zeros(1, device=device)
            if route.source == self.rank:
                axis.send(greeting, 1 - axis.rank)
            else:
                axis.receive_(greeting, 1 - axis.rank)
        self.incoming: dict[Route, Incoming] = {}
        self.arriving: dict[Message, tuple[dict[str, Tensor], list[dist.Work]]] = {}
        self.sent: list[tuple[Tensor, dist.Work]] = []

    def begin(self, passes: Sequence[Sequence[Action]], shapes: Shapes) -> None:
        """Expect the messages of a step; `passes` are those of all ranks, in order."""
        self.shapes = shapes
        self.incoming = {route: Incoming() for route in self.axes if route.target == self.rank}
        for route, incoming in self.incoming.items():
            for action in passes[route.source]:
                message = make_message(action, self.placement.get_stage(route.source, action.chunk))
                if message is not None and self._get_route(message) == route:
                    incoming.expected.append(message)
            self._ask(route)

    def _get_route(self, message: Message) -> Route | None:
        """The channel of a message; None if its stage is the pipeline's end, or both stages are on one rank."""
        if not 0 <= message.target < self.placement.stages:
            return None
        source, target = (self.placement.get_rank(stage) for stage in (message.stage, message.target))
        return None if source == target else Route(message.kind, source, target)

    def is_local(self, message: Message) -> bool:
        """Whether both stages of a message are on this rank."""
        return self._get_route(message) is None

    def _ask(self, route: Route, until: Message | None = None) -> None:
        """Ask for the next messages of a channel: some ahead, and as far as one that is needed now."""
        incoming, axis = self.incoming[route], self.axes[route]
        while incoming.expected and (incoming.asked < AHEAD or (until is not None and until not in self.arriving)):
            message = incoming.expected.popleft()
            tensors = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
                for name, tensor in self.shapes(message.edge, message.microbatch).items()
            }
            works = [dist.irecv(t, group=axis.group, group_src=1 - axis.rank) for t in tensors.values()]
            self.arriving[message] = tensors, [work for work in works if work is not None]
            incoming.asked += 1

    def receive(self, message: Message) -> dict[str, Tensor]:
        """The tensors of a message from another rank, once they are there."""
        route = self._get_route(message)
        assert route is not None
        self._ask(route, until=message)
        tensors, works = self.arriving.pop(message)
        for work in works:
            work.wait()
        self.incoming[route].asked -= 1
        self._ask(route)
        return tensors

    def send(self, message: Message, tensors: Mapping[str, Tensor]) -> None:
        """Begin to send tensors, in the order of the shapes, to the rank of the message's target."""
        route = self._get_route(message)
        assert route is not None
        axis = self.axes[route]
        for name, expected in self.shapes(message.edge, message.microbatch).items():
            tensor = tensors[name].detach().contiguous()
            assert (tensor.shape, tensor.dtype) == expected[:2], f"{name}: {tensor.shape} is not {expected.shape}"
            work = dist.isend(tensor, group=axis.group, group_dst=1 - axis.rank)
            if work is not None:
                self.sent.append((tensor, work))
        self.sent = [(tensor, work) for tensor, work in self.sent if not work.is_completed()]

    def finish(self) -> None:
        """Wait until everything that was sent has left, and check that nothing is still expected."""
        for _, work in self.sent:
            work.wait()
        self.sent.clear()
        left = [*self.arriving, *(message for each in self.incoming.values() for message in each.expected)]
        assert not left, f"{left} are expected"
