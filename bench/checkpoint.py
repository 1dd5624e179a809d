"""Write and read a synthetic native checkpoint from several local ranks, beside dd, cp and cat of as many bytes.

usage: checkpoint.py DIRECTORY [--gb 2] [--ranks 2] [--read-ranks 3] [--saves 3] [--device cpu|cuda]

Reads are cold (the page cache is dropped file by file) and each rank takes its share of the columns of every tensor.
Bytes are counted once, GB are 10⁹ bytes; every write is flushed to the disk before its clock stops.
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mt_core.checkpoint.async_save import AsyncWriter, SavedCheckpoint
from mt_core.checkpoint.commit_protocol import Ranks
from mt_core.checkpoint.native import read_meta, resolve
from mt_core.checkpoint.shard_files import open_part

SHAPE = (4096, 4096)
"""Of a tensor: 64 MiB in fp32."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("directory", type=Path, help="on the disk to measure")
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--read-ranks", type=int, default=3)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    folder = args.directory / "checkpoint-bench"
    folder.mkdir(parents=True)
    try:
        bench(args, folder)
    finally:
        shutil.rmtree(folder)


def bench(args: argparse.Namespace, folder: Path) -> None:
    """All figures, one a line."""
    run = folder / "run"
    for saves in zip(*on_ranks(args.ranks, write, run, args.ranks, args.gb / args.ranks, args), strict=True):
        report_save(saves)
    step = resolve(run)
    files = [step / name for name in read_meta(step)["files"]]
    total = sum(file.stat().st_size for file in files)
    baseline_write(folder, total, files)
    cold(files)
    start = time.perf_counter()
    subprocess.run(["cat", *files], check=True, stdout=subprocess.DEVNULL)
    rate("cat, one process, cold", total, time.perf_counter() - start)
    cold(files)
    seconds = max(on_ranks(args.read_ranks, read, step, args.read_ranks))
    rate(f"read by {args.read_ranks} ranks, columns, cold", total, seconds)
    rate(
        f"read by {args.read_ranks} ranks, columns, warm",
        total,
        max(on_ranks(args.read_ranks, read, step, args.read_ranks)),
    )


def write(rank: int, run: Path, ranks: int, gb: float, args: argparse.Namespace) -> list[SavedCheckpoint]:
    """This rank's saves of the same tensors, a tiny step of training polled between."""
    torch.set_num_threads(1)
    count = max(1, round(gb * 1e9 / (SHAPE[0] * SHAPE[1] * 4)))
    tensors = [(f"{rank}.{n}", torch.randn(SHAPE, device=args.device)) for n in range(count)]
    writer, saves = AsyncWriter(run, Ranks(rank, ranks, "bench"), keep=1), []
    if args.device == "cuda":
        writer.reserve(count * SHAPE[0] * SHAPE[1] * 4)
    for step in range(1, args.saves + 1):
        writer.save(step, {"model": tensors[:1], "optim": tensors[1:]}, {"step": step})
        while (saved := writer.poll()) is None:
            time.sleep(0.01)
        saves.append(saved)
    return saves


def report_save(saves: Sequence[SavedCheckpoint]) -> None:
    """One save, as all ranks saw it."""
    slowest = max(save.write_s + save.commit_s for save in saves)
    pause = max(save.pause_s for save in saves)
    rate(f"save {saves[0].step} by {len(saves)} ranks, pause {pause * 1e3:.0f} ms", saves[0].total_bytes or 0, slowest)


def baseline_write(folder: Path, total: int, files: Sequence[Path]) -> None:
    """What the disk takes from tools that do nothing else."""
    start = time.perf_counter()
    dd = ["dd", "if=/dev/zero", f"of={folder / 'zeros'}", "bs=16M", f"count={total >> 24}", "conv=fsync", "status=none"]
    subprocess.run(dd, check=True)
    rate("dd of zeros with fsync", total, time.perf_counter() - start)
    (folder / "zeros").unlink()
    (folder / "copy").mkdir()
    start = time.perf_counter()
    for number, file in enumerate(files):
        subprocess.run(["cp", file, folder / "copy" / str(number)], check=True)
    subprocess.run(["sync", *(folder / "copy").iterdir()], check=True)
    rate("cp of warm files with sync", total, time.perf_counter() - start)
    shutil.rmtree(folder / "copy")


def read(rank: int, step: Path, ranks: int) -> float:
    """Seconds for this rank's columns of every tensor, into memory that is there already."""
    torch.set_num_threads(1)
    width = -(-SHAPE[1] // ranks)
    into = torch.zeros(SHAPE[0], width)
    start = time.perf_counter()
    for part in ("model", "optim"):
        for stored in open_part(step / part).values():
            box = stored[:, rank * width : (rank + 1) * width]
            into[:, : box.shape[1]].copy_(box)
    return time.perf_counter() - start


def cold(files: Sequence[Path]) -> None:
    """Drop the files from the page cache."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Results of `function(rank, *arguments)` in as many processes."""
    with multiprocessing.get_context("spawn").Pool(ranks) as pool:
        return pool.starmap(function, [(rank, *arguments) for rank in range(ranks)], chunksize=1)


def rate(label: str, total: int, seconds: float) -> None:
    """Print one figure."""
    print(f"{label}: {total / 1e9:.2f} GB in {seconds:.2f} s, {total / seconds / 1e9:.2f} GB/s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
