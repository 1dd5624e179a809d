"""Joining the other ranks and leaving them, both with a limit: missing ranks are named, nobody waits for ever."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from mt_core.distributed.environment import Place, launched, place
from mt_core.distributed.exit_codes import EXIT_LOST_RANK, RankFailure
from mt_core.distributed.heartbeat import Heart
from mt_core.distributed.rendezvous import leave, meet, open_store
from mt_core.distributed.watchdog import supervised
from mt_core.errors import MtError

COLLECTIVE_MARGIN_S = 30.0
"""Collectives give up this much after a stall: first every rank says where it is."""


def local_ranks() -> int:
    """Ranks of this run on this machine."""
    return place().local_ranks


def rank_label() -> str:
    """ " [rank 3]" in a launched process, else ""."""
    return place().label if launched() else ""


def pick_device(wanted: str) -> torch.device:
    """The device of this rank; "auto" takes a GPU if there is one."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise MtError("runtime.device", "'cuda', but no GPU is available here", "allowed: auto, cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", gpu_index(place().local_rank, torch.cuda.device_count()))


def gpu_index(local_rank: int, visible: int) -> int:
    """This rank's GPU among those it sees: its own number, or the only one where the launcher shows it just that."""
    if visible == 1:
        return 0
    if local_rank >= visible:
        found = f"rank {local_rank} of this machine has none: {visible} are visible"
        raise MtError("GPU", found, f"start at most {visible} ranks a machine, or set runtime.device=cpu")
    return local_rank


def deterministic(wanted: bool) -> None:
    """Choose deterministic kernels and collectives; an operation that has none raises, naming itself, when it runs.

    To be called before CUDA and NCCL start: they read their settings once.
    """
    if not wanted:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


@contextmanager
def joined(device: torch.device, run_dir: Path, stall_timeout: float) -> Iterator[Heart]:
    """This process's heart, watched, with all ranks connected on entry and parted on exit.

    One rank alone needs no group. Raises `RankFailure` naming the ranks that did not come within `stall_timeout`
    seconds, or saying that one was lost.
    """
    here = place()
    with supervised(run_dir, here, stall_timeout) as heart:
        if here.ranks == 1:
            yield heart
            return
        heart.beat(0, "join")
        store = open_store(here, stall_timeout)
        meeting = meet(store, here, stall_timeout)
        _init_group(PrefixStore(meeting, store), here, device, stall_timeout)
        heart.beat(0, "start")
        with lost_ranks():
            yield heart
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        heart.beat(heart.step, "done")
        leave(store, meeting, here)  # no rank tears its connections down while another still uses them
        dist.destroy_process_group()  # not after an error: it could wait for ranks that are gone


def _init_group(store: Store, here: Place, device: torch.device, stall_timeout: float) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with lost_ranks():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=here.rank,
            world_size=here.ranks,
            timeout=timedelta(seconds=stall_timeout + COLLECTIVE_MARGIN_S),
            device_id=device if device.type == "cuda" else None,
        )


@contextmanager
def lost_ranks() -> Iterator[None]:
    """Tell a broken connection from other errors: its cause is another rank's end, and that rank says why."""
    try:
        yield
    except RuntimeError as err:
        if not (isinstance(err, dist.DistError) or "gloo/transport" in str(err)):
            raise
        frame = next(f for f in reversed(traceback.extract_tb(sys.exc_info()[2])) if f"{os.sep}mt_" in f.filename)
        where = f"{os.path.basename(frame.filename)}:{frame.lineno}"
        reason = str(err).splitlines()[0]
        raise RankFailure(f"lost another rank in {frame.name} ({where}): {reason}", EXIT_LOST_RANK) from err
