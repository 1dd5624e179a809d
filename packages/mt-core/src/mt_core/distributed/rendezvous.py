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

from mt_core.distributed.environment import AGENT_STORE, LISTENER, Place
from mt_core.distributed.exit_codes import EXIT_MISSING_RANKS, RankFailure
from mt_core.errors import MtError

FIRST_POLL_S, LAST_POLL_S = 0.01, 0.5
LEAVE_S = 60.0
"""How long a rank that is done waits for the others to be; after the last collective they are moments apart."""
NAME = "meeting"


def open_store(here: Place, timeout_s: float) -> Store:
    """The store at MASTER_ADDR:MASTER_PORT: torchrun's, or one that rank 0 serves."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = here.rank == 0 and os.environ.get(AGENT_STORE) != "True"
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


def meet(store: Store, here: Place, timeout_s: float) -> str:
    """Wait until all ranks are here; the name of this meeting. `RankFailure` names those that are missing."""
    mine = uuid.uuid4().hex
    deadline = time.monotonic() + timeout_s
    try:
        return _host(store, here, mine, deadline) if here.rank == 0 else _attend(store, here, mine, deadline)
    except TimeoutError as err:
        message = f"{err} within {timeout_s:g} s (runtime.stall_timeout): ending"
        raise RankFailure(message, EXIT_MISSING_RANKS) from None
    except dist.DistError as err:
        message = f"rank 0 was lost while the ranks were joining: {str(err).splitlines()[0]}"
        raise RankFailure(message, EXIT_MISSING_RANKS) from err


def _host(store: Store, here: Place, mine: str, deadline: float) -> str:
    store.set(NAME, mine)
    waiting, seen = set(range(1, here.ranks)), [mine]
    pause = FIRST_POLL_S
    while waiting:
        for rank in [rank for rank in sorted(waiting) if store.check([f"{mine}/joined/{rank}"])]:
            seen.append(store.get(f"{mine}/joined/{rank}").decode())
            waiting.remove(rank)
        if waiting and time.monotonic() > deadline:
            missing = f"{_ranks(waiting)} of {here.ranks} did not come"
            store.set(f"{mine}/missing", missing)
            time.sleep(2 * LAST_POLL_S)  # the others read it before the store ends with this rank
            raise TimeoutError(missing)
        time.sleep(pause := min(2 * pause, LAST_POLL_S)) if waiting else None
    store.set(f"{mine}/complete", ",".join(seen))
    return mine


def _attend(store: Store, here: Place, mine: str, deadline: float) -> str:
    pause, name = FIRST_POLL_S, ""
    while time.monotonic() < deadline + 4 * LAST_POLL_S:
        if store.check([NAME]):
            name = store.get(NAME).decode()
            store.set(f"{name}/joined/{here.rank}", mine)
            if store.check([f"{name}/complete"]) and mine in store.get(f"{name}/complete").decode():
                return name
            if store.check([f"{name}/missing"]):
                raise TimeoutError(store.get(f"{name}/missing").decode())
        time.sleep(pause := min(2 * pause, LAST_POLL_S))
    raise TimeoutError(f"rank 0 of {here.ranks} did not come")


def leave(store: Store, meeting: str, here: Place) -> None:
    """Wait until all ranks are done, LEAVE_S at most; rank 0, which may serve the store, leaves last."""
    try:
        _mark_and_wait(store, f"{meeting}/done", here, range(here.ranks))
        _mark_and_wait(store, f"{meeting}/left", here, range(1, here.ranks) if here.rank == 0 else ())
    except dist.DistError:
        return  # the work is done and saved: a rank that ended without a word takes nothing away


def _mark_and_wait(store: Store, key: str, here: Place, ranks: Iterable[int]) -> None:
    store.set(f"{key}/{here.rank}", "")
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
