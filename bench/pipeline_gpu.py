"""Run pipelines between GPUs, and compare with one CPU rank.

usage: pipeline_gpu.py [--ranks 2] [--device cuda|cpu] [--dtype fp64] [--layers 8] [--schedules NAME …]

Each schedule has processes of its own, which are ended when they take longer than --limit seconds; that is what a
deadlock looks like. Prints for each the largest relative difference of losses and gradient norms over the steps from
those of one CPU rank in fp64, and the median step. Exits with 1 if one hung or, in fp64, differs by more than 1e-9.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rank_steps import RankSteps
from torch.multiprocessing.spawn import spawn

from mt_cli.run_config import run_config_type
from mt_core.pipeline.schedule_table import SCHEDULES
from mt_core.verification.measure import measure

MOST = 1e-9


def make_config(args: argparse.Namespace, schedule: str | None = None) -> Any:
    """A small Llama; without a schedule, of one rank in fp64."""
    size, stages = args.hidden_size, {"parallel": {"pipeline": args.ranks}, "pipeline": {"schedule": schedule}}
    return run_config_type().model_validate(
        {
            "model": {
                "kind": "gpt",
                "layers": args.layers,
                "hidden_size": size,
                "vocab_size": 251,
                "max_seq_len": 64,
                "attention": {"heads": 4, "num_kv_heads": 2, "head_size": size // 4},
                "mlp": {"kind": "gated", "ffn_hidden_size": 2 * size},
                "norm": {"kind": "rms"},
                "position": {"kind": "rope"},
            },
            "data": {"kind": "mock", "seq_length": 64},
            "batch": {"micro_batch": 1, "global_batch": 4 * args.ranks},
            "precision": {"dtype": args.dtype if schedule else "fp64"},
            "optim": {"lr": 1e-3, "eps": 1e-4},
            **(stages if schedule else {}),
        }
    )


def run(rank: int, args: argparse.Namespace, schedule: str, folder: str) -> None:
    """Steps of one rank; the first writes losses, norms and seconds."""
    steps, lines = RankSteps(make_config(args, schedule), rank, args.ranks, folder, cuda=args.device == "cuda"), []
    for step in range(args.steps):
        start = time.perf_counter()
        loss, norm = (part.double() for part in steps.run(step))
        lines.append(f"{float(steps.mesh.sum_over_losses_(loss))!r} {float(norm)!r} {time.perf_counter() - start!r}")
    if rank == 0:
        (Path(folder) / "steps").write_text("\n".join(lines))
    dist.destroy_process_group()


def try_schedule(args: argparse.Namespace, schedule: str) -> list[list[float]] | None:
    """Loss, norm and seconds of each step; None if the ranks had to be ended."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = spawn(run, (args, schedule, folder), args.ranks, join=False)
        assert ranks is not None
        end = time.monotonic() + args.limit
        while not ranks.join(timeout=max(end - time.monotonic(), 0.1)):
            if time.monotonic() > end:
                for process in ranks.processes:
                    process.kill()
                return None
        return [[float(word) for word in line.split()] for line in (Path(folder) / "steps").read_text().splitlines()]


def main() -> None:
    """Try the schedules one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", default="fp64")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--limit", type=float, default=300.0)
    parser.add_argument("--schedules", nargs="*", default=[*SCHEDULES])
    args = parser.parse_args()
    one, failed = measure(make_config(args), 1, steps=args.steps), False
    for schedule in args.schedules:
        steps = try_schedule(args, schedule)
        if steps is None:
            print(f"{schedule:12} hung: ended after {args.limit:g} s", flush=True)
            failed = True
            continue
        pairs = zip(steps, one.losses, one.norms, strict=True)
        most = max(max(abs(a / loss - 1), abs(b / norm - 1)) for (a, b, _), loss, norm in pairs)
        failed = failed or (args.dtype == "fp64" and not most <= MOST)
        print(f"{schedule:12} {most:.1e} {statistics.median(step[2] for step in steps) * 1e3:.1f} ms", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
