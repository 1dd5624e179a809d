"""Messages between the ranks of a pipeline, and when each rank sends and receives which.

NCCL runs what is asked of a communicator in order, on the GPU, and a receive that waits there can hold up everything
that waits for the GPU: a copy from the host, the first use of a kernel. So a rank must not ask for what depends on its
own later work. Here all ranks' passes and messages get one common order, and each rank keeps to it: even if every
operation waited for both sides before the next began, the first one in that order could always go on.
"""

from collections import deque
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from mt_core.pipeline.actions import Action, Placement

MessageKind = Literal["features", "gradients"]


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


@dataclass(frozen=True, slots=True)
class Send:
    """Begin to send a message."""

    message: Message


@dataclass(frozen=True, slots=True)
class Receive:
    """Ask for a message, which a later pass waits for."""

    message: Message


Operation: TypeAlias = Action | Send | Receive
"""What a rank does next."""


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


def find_route(message: Message, placement: Placement) -> Route | None:
    """The channel of a message; None if its stage is the pipeline's end, or both stages are on one rank."""
    if not 0 <= message.target < placement.stages:
        return None
    source, target = (placement.get_rank(stage) for stage in (message.stage, message.target))
    return None if source == target else Route(message.kind, source, target)


def make_message(action: Action, stage: int) -> Message | None:
    """The message that a pass through a stage ends with, if the pass is of a kind that does."""
    match action.kind:
        case "F":
            return Message("features", stage, action.microbatch)
        case "B" | "I":
            return Message("gradients", stage, action.microbatch)
        case _:
            return None


def find_input(action: Action, stage: int, stages: int) -> Message | None:
    """The message that a pass through a stage begins with; None at the model's ends, and for gradients of weights."""
    match action.kind:
        case "F":
            return Message("features", stage - 1, action.microbatch) if stage else None
        case "B" | "I":
            return Message("gradients", stage + 1, action.microbatch) if stage + 1 < stages else None
        case _:
            return None


def order_operations(passes: Sequence[Sequence[Action]], placement: Placement) -> list[list[Operation]]:
    """Each rank's passes, in their order, with its messages among them.

    Ranks go through rounds: in each, every rank whose next input is there does one pass, then the messages that these
    passes made are sent and received, in the order of the sending ranks. The passes must be free of deadlocks.
    """
    operations: list[list[Operation]] = [[] for _ in passes]
    left = [deque(each) for each in passes]
    there: set[Message] = set()
    while any(left):
        able = [rank for rank, actions in enumerate(left) if actions and _is_ready(actions[0], rank, there, placement)]
        assert able, "passes wait for each other"
        made: list[Message] = []
        for rank in able:
            action = left[rank].popleft()
            operations[rank].append(action)
            message = make_message(action, placement.get_stage(rank, action.chunk))
            made += [message] if message is not None else []
        there.update(made)
        for message in made:
            if (route := find_route(message, placement)) is not None:
                operations[route.source].append(Send(message))
                operations[route.target].append(Receive(message))
    return operations


def _is_ready(action: Action, rank: int, there: Container[Message], placement: Placement) -> bool:
    """Whether the message that a pass begins with was sent before."""
    message = find_input(action, placement.get_stage(rank, action.chunk), placement.stages)
    return message is None or message in there
