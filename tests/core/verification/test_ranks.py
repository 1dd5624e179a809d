"""Functions on several ranks: what they return, and what is told of ranks that fail, die or hang."""

import os
import re
import signal
import time

import pytest
import torch

from mt_core.errors import MtError
from mt_core.verification.ranks import RanksFailed, run_ranks

FOR_EVER_S = 3600.0
"""What waits so long has failed: pytest ends it."""


def total(axis, factor):
    return float(axis.sum_(torch.tensor(float(axis.rank * factor))))


def refuse(axis):
    if axis.rank == 1:
        raise MtError("model.layers", "0", "at least 1")
    axis.barrier()


def fail(axis):
    if axis.rank == 1:
        raise ZeroDivisionError("on purpose")
    axis.barrier()


def die(axis, number):
    if axis.rank == 1:
        os.kill(os.getpid(), number)
    axis.barrier()


def leave(axis):
    if axis.rank == 1:
        os._exit(7)
    fall_asleep()


def hang(axis):
    if axis.rank == 1:
        return
    fall_asleep()


def fall_asleep():
    time.sleep(FOR_EVER_S)


def large(axis):
    return torch.full((3_000_000,), axis.rank)


def test_results_come_in_the_order_of_the_ranks():
    assert run_ranks(3, total, 2) == [6.0, 6.0, 6.0]
    assert [int(found[-1]) for found in run_ranks(2, large)] == [0, 1]


def test_a_mistake_of_the_user_that_one_rank_finds_is_raised_as_it_is():
    with pytest.raises(MtError, match=r"^model.layers: 0; at least 1$"):
        run_ranks(2, refuse)


def test_what_a_rank_raises_is_told_with_its_traceback():
    with pytest.raises(
        RanksFailed, match=r"rank 1 raised\nTraceback [^$]* in fail\n[^$]*ZeroDivisionError: on purpose"
    ):
        run_ranks(2, fail)


@pytest.mark.parametrize(
    ("number", "error", "told"),
    [
        (signal.SIGKILL, MtError, "rank 1: was killed by SIGKILL; if memory ran out, use fewer ranks"),
        (signal.SIGSEGV, RanksFailed, "rank 1 was killed by SIGSEGV without an answer"),
    ],
)
def test_a_rank_that_is_killed_is_told_at_once(number, error, told):
    with pytest.raises(error, match=told):
        run_ranks(2, die, number, timeout_s=FOR_EVER_S)


def test_a_rank_that_leaves_is_told_although_another_would_go_on():
    with pytest.raises(RanksFailed, match="rank 1 ended with code 7 without an answer"):
        run_ranks(2, leave, timeout_s=FOR_EVER_S)


def test_ranks_that_hang_are_named_with_their_stacks():
    with pytest.raises(RanksFailed, match="no answer of rank 0 in 3 s") as caught:
        run_ranks(2, hang, timeout_s=3)
    told = re.findall(r"rank \d:|in fall_asleep|in hang", str(caught.value))
    assert told == ["rank 0:", "in fall_asleep", "in hang"]
