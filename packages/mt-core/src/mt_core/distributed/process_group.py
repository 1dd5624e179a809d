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

from mt_core.distributed.environment import RankInfo, get_rank_info, is_launched
from mt_core.distributed.exit_codes import EXIT_LOST_RANK, RankFailure
from mt_core.distributed.heartbeat import Heartbeat
from mt_core.distributed.rendezvous import exit_barrier, open_store, rendezvous
from mt_core.distributed.watchdog import supervised
from mt_core.errors import MtError

DEVICES = ("auto", "cpu", "cuda")
COLLECTIVE_MARGIN_S = 30.0
"""Collectives give up this much after a stall: first every rank says where it is."""


def local_ranks() -> int:
    """Ranks of this run on this machine."""
    return get_rank_info().local_world_size


def rank_label() -> str:
    """ " [rank 3]" in a launched process, else ""."""
    return get_rank_info().label if is_launched() else ""


def pick_device(requested: str, *, where: str = "runtime.device") -> torch.device:
    """The device of this rank; "auto" takes a GPU if there is one. `where` names the setting in errors."""
    if requested not in DEVICES:
        raise MtError(where, f"unknown device {requested!r}", f"allowed: {', '.join(DEVICES)}")
    if requested == "cuda" and not torch.cuda.is_available():
        raise MtError(where, "'cuda', but no GPU is available here", "allowed: auto, cpu")
    if requested == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", gpu_index(get_rank_info().local_rank, torch.cuda.device_count()))


def gpu_index(local_rank: int, visible: int) -> int:
    """This rank's GPU among those it sees: its own number, or the only one where the launcher shows it just that."""
    if visible == 1:
        return 0
    if local_rank >= visible:
        actual = f"rank {local_rank} of this machine has none: {visible} are visible"
        raise MtError("GPU", actual, f"start at most {visible} ranks a machine, or set runtime.device=cpu")
    return local_rank


def use_deterministic_kernels(requested: bool) -> None:
    """Choose deterministic kernels and collectives; an operation that has none raises, naming itself, when it runs.

    To be called before CUDA and NCCL start: they read their settings once.
    """
    if not requested:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


@contextmanager
def process_group(device: torch.device, run_dir: Path, stall_timeout: float) -> Iterator[Heartbeat]:
    """Connect all ranks on entry and disconnect them on exit; yields this process's heartbeat, which a thread watches.

    A single rank needs no group. Raises `RankFailure` naming the ranks that did not come within `stall_timeout`
    seconds, or saying that one was lost.
    """
    info = get_rank_info()
    with supervised(run_dir, info, stall_timeout) as heartbeat:
        if info.world_size == 1:
            yield heartbeat
            return
        heartbeat.update(0, "join")
        store = open_store(info, stall_timeout)
        attempt = rendezvous(store, info, stall_timeout)
        _init_group(PrefixStore(attempt, store), info, device, stall_timeout)
        heartbeat.update(0, "start")
        with connection_errors():
            yield heartbeat
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        heartbeat.update(heartbeat.step, "done")
        exit_barrier(store, attempt, info)  # no rank tears its connections down while another still uses them
        dist.destroy_process_group()  # not after an error: it could wait for ranks that are gone


def _init_group(store: Store, info: RankInfo, device: torch.device, stall_timeout: float) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with connection_errors():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=info.rank,
            world_size=info.world_size,
            timeout=timedelta(seconds=stall_timeout + COLLECTIVE_MARGIN_S),
            device_id=device if device.type == "cuda" else None,
        )


@contextmanager
def connection_errors() -> Iterator[None]:
    """Raise a broken connection as a `RankFailure`: its cause is another rank's end, which that rank reports."""
    try:
        yield
    except RuntimeError as err:
        if not (isinstance(err, dist.DistError) or "gloo/transport" in str(err)):
            raise
        frame = next(f for f in reversed(traceback.extract_tb(sys.exc_info()[2])) if f"{os.sep}mt_" in f.filename)
        where = f"{os.path.basename(frame.filename)}:{frame.lineno}"
        reason = str(err).splitlines()[0]
        raise RankFailure(f"lost another rank in {frame.name} ({where}): {reason}", EXIT_LOST_RANK) from err
