"""Starting ranks, and joining them: the only module that reads the launcher's environment variables."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from mt_core.errors import MtError
from mt_core.parallel.axis import Axis


def launched() -> bool:
    """Whether torchrun, srun with its variables, or `mt train --nproc` started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_ranks() -> int:
    """Ranks of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if launched() else 1


def rank_label() -> str:
    """ " [rank 3]" in a launched process, else ""."""
    return f" [rank {os.environ['RANK']}]" if launched() else ""


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `python ARGUMENTS` as `processes` ranks on this machine; the exit status of the first that failed, or 0."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=f"mt-{os.getpid()}",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as err:
        return err.get_first_failure()[1].exitcode
    except SignalException as err:
        return 128 + int(err.sigval)
    return 0


def pick_device(wanted: str) -> torch.device:
    """The device of this rank; "auto" takes a GPU if there is one."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise MtError("runtime.device", "'cuda', but no GPU is available here", "allowed: auto, cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


@contextmanager
def data_axis(device: torch.device) -> Iterator[Axis]:
    """The axis of all launched ranks; joined on entry, left on exit. One process alone needs no group."""
    if not launched() or os.environ["WORLD_SIZE"] == "1":
        yield Axis("data")
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
    try:
        yield Axis("data", dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
        dist.barrier()  # no rank tears its connections down while another still uses them
    finally:
        dist.destroy_process_group()
