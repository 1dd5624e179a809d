"""How ranks find each other through a key-value store, and learn who is missing.

A store outlives an attempt: under torchrun the agent holds it, so it has the marks of ranks that were killed since.
Every attempt therefore has a name, which rank 0 draws, and a rank is in only if rank 0 has counted the very mark that
this process set.
"""

import os
import time
import uuid
from collections.abc import Iterable
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from mt_core.distributed.environment import AGENT_STORE, LISTENER, RankInfo
from mt_core.distributed.exit_codes import EXIT_MISSING_RANKS, RankFailure
from mt_core.errors import MtError

FIRST_POLL_S, LAST_POLL_S = 0.01, 0.5
LEAVE_S = 60.0
"""How long a rank that is done waits for the others to be; after the last collective they are moments apart."""
RENDEZVOUS_KEY = "rendezvous"


def open_store(info: RankInfo, timeout_s: float) -> Store:
    """The store at MASTER_ADDR:MASTER_PORT: torchrun's, or one that rank 0 serves."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = info.rank == 0 and os.environ.get(AGENT_STORE) != "True"
    listener = int(os.environ[LISTENER]) if serves and LISTENER in os.environ else None
    try:
        return TCPStore(
            address,
            port,
            is_master=serves,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener,
        )
    except dist.DistNetworkError as err:
        if serves:
            raise MtError("MASTER_PORT", f"{port} is in use on this machine", "set another one on every rank") from err
        message = f"rank 0 does not answer at {address}:{port} after {timeout_s:g} s"
        raise RankFailure(message, EXIT_MISSING_RANKS) from err


def rendezvous(store: Store, info: RankInfo, timeout_s: float) -> str:
    """Wait until all ranks are here; the name of this attempt. `RankFailure` names those that are missing."""
    own_mark = uuid.uuid4().hex
    deadline = time.monotonic() + timeout_s
    try:
        meet = _coordinate if info.rank == 0 else _join
        return meet(store, info, own_mark, deadline)
    except TimeoutError as err:
        message = f"{err} within {timeout_s:g} s (runtime.stall_timeout): ending"
        raise RankFailure(message, EXIT_MISSING_RANKS) from None
    except dist.DistError as err:
        message = f"rank 0 was lost while the ranks were joining: {str(err).splitlines()[0]}"
        raise RankFailure(message, EXIT_MISSING_RANKS) from err


def _coordinate(store: Store, info: RankInfo, own_mark: str, deadline: float) -> str:
    store.set(RENDEZVOUS_KEY, own_mark)
    waiting, seen = set(range(1, info.world_size)), [own_mark]
    pause = FIRST_POLL_S
    while waiting:
        for rank in [rank for rank in sorted(waiting) if store.check([f"{own_mark}/joined/{rank}"])]:
            seen.append(store.get(f"{own_mark}/joined/{rank}").decode())
            waiting.remove(rank)
        if waiting and time.monotonic() > deadline:
            missing = f"{_ranks(waiting)} of {info.world_size} did not come"
            store.set(f"{own_mark}/missing", missing)
            time.sleep(2 * LAST_POLL_S)  # the others read it before the store ends with this rank
            raise TimeoutError(missing)
        if waiting:
            time.sleep(pause := min(2 * pause, LAST_POLL_S))
    store.set(f"{own_mark}/complete", ",".join(seen))
    return own_mark


def _join(store: Store, info: RankInfo, own_mark: str, deadline: float) -> str:
    pause, name = FIRST_POLL_S, ""
    while time.monotonic() < deadline + 4 * LAST_POLL_S:
        if store.check([RENDEZVOUS_KEY]):
            name = store.get(RENDEZVOUS_KEY).decode()
            store.set(f"{name}/joined/{info.rank}", own_mark)
            if store.check([f"{name}/complete"]) and own_mark in store.get(f"{name}/complete").decode():
                return name
            if store.check([f"{name}/missing"]):
                raise TimeoutError(store.get(f"{name}/missing").decode())
        time.sleep(pause := min(2 * pause, LAST_POLL_S))
    raise TimeoutError(f"rank 0 of {info.world_size} did not come")


def exit_barrier(store: Store, attempt: str, info: RankInfo) -> None:
    """Wait until all ranks are done, LEAVE_S at most; rank 0, which may serve the store, leaves last."""
    try:
        _mark_and_wait(store, f"{attempt}/done", info, range(info.world_size))
        _mark_and_wait(store, f"{attempt}/left", info, range(1, info.world_size) if info.rank == 0 else ())
    except dist.DistError:
        return  # the work is done and saved: a rank that ended without a word takes nothing away


def _mark_and_wait(store: Store, key: str, info: RankInfo, ranks: Iterable[int]) -> None:
    store.set(f"{key}/{info.rank}", "")
    if keys := [f"{key}/{rank}" for rank in ranks]:
        store.wait(keys, timedelta(seconds=LEAVE_S))


def _ranks(ranks: Iterable[int]) -> str:
    """ "ranks 1-3, 7" for 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ("rank " if len(runs) == 1 and len(runs[0]) == 1 else "ranks ") + ", ".join(parts)
