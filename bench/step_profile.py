"""Where the time of a training step goes on a GPU, by kind of kernel, and how much of its communication is exposed.

usage: step_profile.py PRESET [--nproc 1] [--steps 3] [--warmup 5] [--top 25] [--trace DIR] [--set KEY=VALUE …]

Steps are those of `rank_steps`, under torch's profiler after the warm-up. Kernels that run at the same time count each
for themselves; exposed is what no other kernel runs beside; idle is time in which the GPU runs none.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rank_steps import RankSteps
from torch.multiprocessing.spawn import spawn

from mt_cli.run_config import load_run_config

KINDS = (
    ("communication", ("nccl",)),
    ("attention", ("flash", "fmha", "sdpa", "attention")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "cublas", "grouped")),
    ("optimizer", ("multi_tensor", "adam", "foreach", "lpnorm")),
    ("copies", ("memcpy", "memset", "copy")),
    ("compiled", ("triton",)),
)
"""Kinds of kernels by a part of their names, the first that fits."""


class Kernel(NamedTuple):
    """A kernel's run, in microseconds."""

    name: str
    start: float
    end: float


def run(rank: int, args: argparse.Namespace, folder: str) -> None:
    """Profile one rank; the first one reports."""
    config = make_config(args)
    steps = RankSteps(config, rank, args.nproc, folder)
    for step in range(args.warmup):
        steps.run(step)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        for step in range(args.steps):
            steps.run(args.warmup + step)
        torch.cuda.synchronize()
    trace = Path(args.trace or folder) / f"trace-{rank}.json"
    profile.export_chrome_trace(str(trace))
    if rank == 0:
        report(args, list_kernels(json.loads(trace.read_text())["traceEvents"]))
    dist.destroy_process_group()


def make_config(args: argparse.Namespace) -> Any:
    """The preset with the overrides of the call."""
    return load_run_config([], args.overrides, args.preset, rules=False)


def list_kernels(events: Iterable[dict[str, Any]]) -> list[Kernel]:
    """What the GPU ran, in order."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    kernels = [
        Kernel(event["name"], event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") in kinds
    ]
    return sorted(kernels, key=lambda kernel: kernel.start)


def find_kind(name: str) -> str:
    """The kind of a kernel."""
    lower = name.lower()
    return next((kind for kind, parts in KINDS if any(part in lower for part in parts)), "other")


def merge(kernels: Iterable[Kernel]) -> Iterator[tuple[float, float]]:
    """The times in which at least one of these kernels runs."""
    start = end = None
    for kernel in kernels:
        if end is None or kernel.start > end:
            if end is not None:
                yield start, end
            start, end = kernel.start, kernel.end
        end = max(end, kernel.end)
    if end is not None:
        yield start, end


def report(args: argparse.Namespace, kernels: list[Kernel]) -> None:
    """Milliseconds a step, by kind and of the longest kernels."""
    unit = 1e3 * args.steps
    sums: Counter[str] = Counter()
    names: Counter[str] = Counter()
    for kernel in kernels:
        sums[find_kind(kernel.name)] += kernel.end - kernel.start
        names[kernel.name] += kernel.end - kernel.start
    busy = sum(end - start for start, end in merge(kernels))
    computing = sum(end - start for start, end in merge(k for k in kernels if find_kind(k.name) != "communication"))
    whole = kernels[-1].end - kernels[0].start
    print(f"{args.preset} {' '.join(args.overrides)}: {whole / unit:.1f} ms a step under the profiler")
    for kind, total in sums.most_common():
        print(f"  {kind:<24}{total / unit:8.1f} ms")
    for what, time in (("exposed communication", busy - computing), ("idle", whole - busy)):
        print(f"  {what:<24}{time / unit:8.1f} ms")
    for name, total in names.most_common(args.top):
        count = sum(kernel.name == name for kernel in kernels) / args.steps
        print(f"    {total / unit:8.2f} ms {count:8.1f} × {find_kind(name)[:8]:<8} {name[:110]}")


def main() -> None:
    """Profile some steps."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("preset")
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--top", type=int, default=25)
    parser.add_argument("--trace", help="keep the traces of all ranks in this folder")
    parser.add_argument("--set", nargs="*", default=[], dest="overrides")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spawn(run, (args, folder), args.nproc)


if __name__ == "__main__":
    main()
