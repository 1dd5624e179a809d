"""Run a function on several ranks over gloo: a forkserver with torch preloaded starts them in tenths of a second."""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mt_core.parallel.axis import Axis

TIMEOUT_S = 120


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Results of `function(axis, *arguments)` on each of `size` fresh processes, in rank order; plain values only."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "mt_models.gpt"])
    with tempfile.TemporaryDirectory() as folder:
        results = context.Queue()
        processes = [
            context.Process(target=_rank, args=(rank, size, Path(folder) / "meet", function, arguments, results))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        try:
            found = dict(results.get(timeout=TIMEOUT_S) for _ in processes)
        finally:
            for process in processes:
                process.join(timeout=10)
                process.kill()
    failures = [value for value in found.values() if isinstance(value, Failure)]
    assert not failures, "\n".join(failures)
    return [found[rank] for rank in range(size)]


class Failure(str):
    """The traceback of a rank that raised."""


def _rank(
    rank: int, size: int, meet: Path, function: Callable[..., Any], arguments: tuple[Any, ...], results: Any
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=size)
        results.put((rank, function(Axis("data", rank, size, dist.group.WORLD), *arguments)))
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        results.put((rank, Failure(traceback.format_exc())))
