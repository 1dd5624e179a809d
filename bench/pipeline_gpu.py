"""Run pipelines between GPUs, which `mt train` refuses until they are proven there, and compare with one CPU rank.

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

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from mt_cli.run_config import run_config_type
from mt_core.distributed.mesh import make_mesh
from mt_core.distributed.topology import resolve_dims
from mt_core.parallel.apply import parallelize
from mt_core.parallel.pipeline.cut import connect_pipeline
from mt_core.pipeline.schedule_table import SCHEDULES
from mt_core.plugins import component
from mt_core.training.loss_scale import LossScale
from mt_core.training.optimizer import parameter_groups
from mt_core.training.state import TrainState
from mt_core.training.step import backward, reduce, update
from mt_core.verification.measure import measure, random_batches

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
    cuda = args.device == "cuda"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    store = f"file://{folder}/store"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", init_method=store, rank=rank, world_size=args.ranks
    )
    config = make_config(args, schedule)
    mesh = make_mesh(resolve_dims(config.parallel, args.ranks))
    model, data_parallel, pipeline = parallelize(config, mesh, device, connect=connect_pipeline)
    groups = parameter_groups(data_parallel.main_params, data_parallel.shapes, config.optim.weight_decay)
    optimizer = component("optimizer", config.optim.name)(groups, config.optim)
    scale = LossScale.initial(config.precision)
    TrainState(model, data_parallel, optimizer, loss_scale=scale, pipeline=pipeline).initialize(config.runtime.seed)
    tokens, lines = config.batch.global_batch * config.data.seq_length, []
    for step in range(args.steps):
        batches, start = list(random_batches(config, mesh, step, documents=False)), time.perf_counter()
        loss, _ = backward(model, data_parallel, batches, tokens, device, scale=scale.value, pipeline=pipeline)
        reduce(data_parallel)
        updated = update(
            data_parallel, optimizer, lr=config.optim.lr, clip_norm=config.optim.clip_norm, scale=scale.value
        )
        data_parallel.wait()
        norm = float(updated.norm)
        lines.append(f"{float(mesh.sum_over_losses_(loss.double()))!r} {norm!r} {time.perf_counter() - start!r}")
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
