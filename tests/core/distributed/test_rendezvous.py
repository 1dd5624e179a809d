"""How ranks meet over a store: the missing are named, and what an earlier attempt left there does not confuse."""

import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store, TCPStore

from mt_core.distributed.environment import RankInfo
from mt_core.distributed.exit_codes import EXIT_LOST_RANK, EXIT_MISSING_RANKS, RankFailure
from mt_core.distributed.process_group import connection_errors, gpu_index, pick_device
from mt_core.distributed.rendezvous import _ranks, exit_barrier, open_store, rendezvous
from mt_core.errors import MtError


def together(*calls: Callable[[], str]) -> list["Future[str]"]:
    """All calls at once, in threads; their results or errors."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return [threads.submit(call) for call in calls]


def meeting_of(store: Store, ranks: int, present: list[int], seconds: float = 20) -> list["Future[str]"]:
    return together(*(lambda rank=rank: rendezvous(store, RankInfo(rank, ranks), seconds) for rank in present))


def test_all_that_meet_know_the_same_name():
    names = [future.result() for future in meeting_of(HashStore(), 4, [3, 1, 0, 2])]
    assert len(set(names)) == 1


@pytest.mark.parametrize(
    ("ranks", "present", "missing"),
    [(4, [0, 2], "ranks 1, 3"), (8, [0, 1, 5], "ranks 2-4, 6-7"), (2, [0], "rank 1")],
)
def test_the_ranks_that_do_not_come_are_named_by_all_that_did(ranks, present, missing):
    for future in meeting_of(HashStore(), ranks, present, 0.3):
        error = future.exception()
        assert isinstance(error, RankFailure)
        assert str(error) == f"{missing} of {ranks} did not come within 0.3 s (runtime.stall_timeout): ending"
        assert error.code == EXIT_MISSING_RANKS


def test_without_rank_0_it_is_the_one_missing():
    for future in meeting_of(HashStore(), 3, [1, 2], 0.2):
        assert "rank 0 of 3 did not come within 0.2 s" in str(future.exception())


def test_marks_of_an_attempt_whose_ranks_were_killed_do_not_count():
    store = HashStore()
    before = meeting_of(store, 2, [0, 1])[0].result()
    late = [
        lambda: rendezvous(store, RankInfo(1, 2), 20),
        lambda: time.sleep(0.3) or rendezvous(store, RankInfo(0, 2), 20),
    ]
    after = [future.result() for future in together(*late)]
    assert after[0] == after[1] != before
    for future in meeting_of(store, 2, [0], 0.3):
        assert "rank 1 of 2 did not come" in str(future.exception())


def test_a_later_attempt_may_have_fewer_ranks():
    store = HashStore()
    meeting_of(store, 3, [0, 1, 2])
    names = {future.result() for future in meeting_of(store, 2, [0, 1])}
    assert len(names) == 1


def test_ranks_leave_together():
    store = HashStore()
    order = []

    def go(rank: int) -> str:
        time.sleep(0.2 * (rank == 1))
        order.append("done")
        exit_barrier(store, "m", RankInfo(rank, 2))
        order.append("left")
        return ""

    for future in together(lambda: go(0), lambda: go(1)):
        future.result()
    assert order == ["done", "done", "left", "left"]


class Silent:
    """A store in which the other rank leaves no word: a wait ends at its limit, here at once."""

    def __init__(self) -> None:
        self.limits: list[timedelta] = []

    def set(self, key: str, value: str) -> None:
        pass

    def wait(self, keys: list[str], limit: timedelta) -> None:
        self.limits.append(limit)
        raise dist.DistStoreError("wait timeout")


def test_a_rank_that_died_after_the_work_keeps_nobody():
    store = Silent()
    exit_barrier(store, "m", RankInfo(0, 2))
    assert store.limits == [timedelta(seconds=60)]


@pytest.fixture
def address(monkeypatch) -> int:
    """A free port, named in the environment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    return port


def test_a_first_rank_that_does_not_answer_is_named(address):
    with pytest.raises(RankFailure, match=f"rank 0 does not answer at 127.0.0.1:{address} after 1 s") as caught:
        open_store(RankInfo(1, 2), 1)
    assert caught.value.code == EXIT_MISSING_RANKS


def test_a_port_in_use_is_told(address):
    with socket.create_server(("", address)), pytest.raises(MtError) as caught:
        open_store(RankInfo(0, 2), 5)
    assert str(caught.value) == f"MASTER_PORT: {address} is in use on this machine; set another one on every rank"


def test_the_store_s_end_while_joining_is_told(address):
    server = TCPStore("127.0.0.1", address, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    store = open_store(RankInfo(1, 2), 5)
    server.set("x", "y")
    del server
    with pytest.raises(RankFailure, match="rank 0 was lost while the ranks were joining"):
        rendezvous(store, RankInfo(1, 2), 5)


def test_a_broken_connection_is_another_rank_s_doing_and_other_errors_are_not():
    with (
        pytest.raises(RankFailure, match=r"lost another rank in .* \(.*\): .*gloo/transport/tcp") as caught,
        connection_errors(),
    ):
        meet_gloo_error()
    assert caught.value.code == EXIT_LOST_RANK
    with pytest.raises(RuntimeError, match="shapes"), connection_errors():
        raise RuntimeError("shapes cannot be multiplied")


def meet_gloo_error() -> None:
    raise RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer")


def test_ranks_are_listed_in_runs():
    assert _ranks([5]) == "rank 5"
    assert _ranks([3, 1, 2, 9, 7, 8]) == "ranks 1-3, 7-9"


def test_a_rank_takes_its_own_gpu_or_the_only_one_it_sees():
    assert [gpu_index(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert gpu_index(3, 1) == 0
    with pytest.raises(MtError, match="GPU: rank 3 of this machine has none: 2 are visible; start at most 2 ranks"):
        gpu_index(3, 2)


def test_the_cpu_is_taken_when_asked_for():
    assert pick_device("cpu") == torch.device("cpu")
    assert not dist.is_initialized()
