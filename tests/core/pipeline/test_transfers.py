"""Messages of a pipeline never wait for each other, even if whatever a rank does waits for all that it asked for."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import pytest

from mt_core.pipeline.actions import Action, Placement
from mt_core.pipeline.rank_schedules import ScheduleSize
from mt_core.pipeline.schedule_table import SCHEDULES, build_schedule
from mt_core.pipeline.transfers import (
    Message,
    Operation,
    Receive,
    Route,
    Send,
    find_input,
    find_route,
    make_message,
    order_operations,
)

CHUNKS = {"interleaved": (2, 3, 4)}
COUNTS = (1, 3, 8, 17)
Communicator = Callable[[Route], object]
COMMUNICATORS: dict[str, Communicator] = {
    "one for each kind and direction": lambda route: route,
    "one for each pair of ranks": lambda route: frozenset(route[1:]),
}


def list_sizes() -> list[tuple[str, ScheduleSize]]:
    """Every schedule with up to 8 ranks, and the numbers of microbatches and chunks that it takes; those that are
    generated also for passes of unequal length."""
    sizes: list[tuple[str, ScheduleSize]] = []
    for name, kind in SCHEDULES.items():
        for ranks, count, chunks in product(range(2, 9), COUNTS, CHUNKS.get(name, kind.chunks[:1])):
            size = ScheduleSize(ranks, count, chunks)
            if kind.takes(size):
                sizes.append((name, size))
            if kind.generated and count == 8:
                times = [(1.0 + (3 * stage) % 4, 2.0, (stage % 3) / 2) for stage in range(ranks * chunks)]
                sizes.append((name, replace(size, pass_times=tuple(times))))
    return sizes


def list_passes(name: str, size: ScheduleSize) -> tuple[list[list[Action]], Placement]:
    schedule = build_schedule(name, size)
    return [[*schedule.list_passes(rank)] for rank in range(size.ranks)], schedule.placement


def find_stuck(operations: Sequence[Sequence[Operation]], placement: Placement, communicator: Communicator) -> set[int]:
    """The ranks that never end, where NCCL moves the messages.

    What is posted to a communicator runs in order, and a message moves when it is first in line on both of its ranks.
    A pass begins when all that its rank has posted is done: something in it may wait for the whole GPU, such as a copy
    from the host, or a kernel that is loaded when it is first used.
    """
    left = [deque(each) for each in operations]
    lines: dict[tuple[int, object], deque[Operation]] = {}

    def post(rank: int) -> bool:
        """Post what comes next on a rank; False if it has to wait."""
        operation = left[rank][0]
        if isinstance(operation, Action):
            if any(line for (owner, _), line in lines.items() if owner == rank):
                return False
        else:
            route = find_route(operation.message, placement)
            assert route is not None
            assert rank == (route.source if isinstance(operation, Send) else route.target)
            lines.setdefault((rank, communicator(route)), deque()).append(operation)
        left[rank].popleft()
        return True

    def move() -> bool:
        """Move one message; False if there is none that can."""
        for (_, group), line in lines.items():
            if not line or not isinstance(line[0], Send):
                continue
            route = find_route(line[0].message, placement)
            assert route is not None
            other = lines.get((route.target, group))
            if other and other[0] == Receive(line[0].message):
                line.popleft()
                other.popleft()
                return True
        return False

    while True:
        posted = [post(rank) for rank, each in enumerate(left) if each]
        if not any([*posted, move()]):
            unfinished = {rank for rank, each in enumerate(left) if each}
            return unfinished | {rank for (rank, _), line in lines.items() if line}


def ask_ahead(passes: Sequence[Sequence[Action]], placement: Placement, ahead: int = 2) -> list[list[Operation]]:
    """The order that hung on two H200s: some messages of each channel are asked for at the begin, and one more as each
    is taken; messages are sent by the passes that make them."""
    sent: dict[Route, deque[Message]] = {}
    for rank, each in enumerate(passes):
        for action in each:
            message = make_message(action, placement.get_stage(rank, action.chunk))
            if message is not None and (route := find_route(message, placement)):
                sent.setdefault(route, deque()).append(message)
    operations: list[list[Operation]] = [[] for _ in passes]
    for rank, each in enumerate(passes):
        expected = {route: line.copy() for route, line in sent.items() if route.target == rank}
        for line in expected.values():
            operations[rank] += [Receive(line.popleft()) for _ in range(min(ahead, len(line)))]
        for action in each:
            stage = placement.get_stage(rank, action.chunk)
            operations[rank].append(action)
            needed = find_input(action, stage, placement.stages)
            if needed and (route := find_route(needed, placement)) and expected[route]:
                operations[rank].append(Receive(expected[route].popleft()))
            made = make_message(action, stage)
            if made and find_route(made, placement):
                operations[rank].append(Send(made))
    return operations


@pytest.mark.parametrize("communicator", COMMUNICATORS)
def test_no_schedule_comes_to_a_stop(communicator):
    stuck = {
        (name, size): ranks
        for name, size in list_sizes()
        if (passes := list_passes(name, size))
        and (ranks := find_stuck(order_operations(*passes), passes[1], COMMUNICATORS[communicator]))
    }
    assert stuck == {}
    assert {name for name, _ in list_sizes()} == {*SCHEDULES}


def test_messages_that_are_asked_for_ahead_come_to_a_stop():
    """A rank that has asked for a gradient waits for it before it computes the features that the gradient is of."""
    for name, size in list_sizes():
        passes, placement = list_passes(name, size)
        assert find_stuck(ask_ahead(passes, placement), placement, lambda route: route)


def test_messages_that_two_ranks_send_before_they_receive_come_to_a_stop():
    """On one communicator the order of a rank's own messages counts too."""
    passes, placement = list_passes("1f1b", ScheduleSize(2, 4))
    operations = order_operations(passes, placement)
    late = [[*each] for each in operations]
    for each in late:  # each message is asked for only when the pass that needs it comes
        for receive in [operation for operation in each if isinstance(operation, Receive)]:
            rank = late.index(each)
            each.remove(receive)
            needing = next(
                number
                for number, operation in enumerate(each)
                if isinstance(operation, Action)
                and find_input(operation, placement.get_stage(rank, operation.chunk), 2) == receive.message
            )
            each.insert(needing, receive)
    pair = COMMUNICATORS["one for each pair of ranks"]
    assert find_stuck(operations, placement, pair) == set()
    assert find_stuck(late, placement, pair) == {0, 1}


def test_every_message_is_sent_after_it_is_made_and_asked_for_before_it_is_needed():
    for name, size in list_sizes():
        passes, placement = list_passes(name, size)
        for rank, each in enumerate(order_operations(passes, placement)):
            assert [operation for operation in each if isinstance(operation, Action)] == passes[rank]
            made: set[Message] = set()
            asked: set[Message] = set()
            for operation in each:
                match operation:
                    case Send(message):
                        made.remove(message)
                    case Receive(message):
                        assert message not in asked
                        asked.add(message)
                    case Action():
                        stage = placement.get_stage(rank, operation.chunk)
                        needed, message = find_input(operation, stage, placement.stages), make_message(operation, stage)
                        if needed and find_route(needed, placement):
                            asked.remove(needed)
                        if message and find_route(message, placement):
                            made.add(message)
            assert not made
            assert not asked


def test_passes_that_wait_for_each_other_are_no_order():
    backwards = [[Action("B", 0), Action("F", 0)], [Action("F", 0), Action("B", 0)]]
    with pytest.raises(AssertionError, match="passes wait for each other"):
        order_operations(backwards, Placement(2))
