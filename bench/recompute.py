"""Memory and time of every kind of recomputation, in one run of `mt train`'s own step on random tokens.

usage: recompute.py [--preset gpt2-124m] [--steps 3] [--set section.field=value …]

Prints, for each, the median step and the peak memory above that of weights, gradients and optimizer: of the GPU, or on
a CPU of the process (each kind in a fresh one).
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time

import torch

from mt_cli.run_config import load_run_config
from mt_cli.train.compose import build_state
from mt_core.distributed.mesh import Mesh
from mt_core.training.step import backward, reduce, update

KINDS = {
    "none": [],
    "selective": ["recompute.granularity=selective"],
    "full, uniform 1": ["recompute.granularity=full", "recompute.layers=1"],
    "full, uniform 3": ["recompute.granularity=full", "recompute.layers=3"],
    "full, block half": ["recompute.granularity=full", "recompute.method=block", "recompute.layers={half}"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--preset", default="gpt2-124m")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], dest="overrides")
    parser.add_argument("--kind", choices=KINDS)
    args = parser.parse_args()
    if args.kind:
        measure(args)
        return
    for kind in KINDS:
        subprocess.run([sys.executable, *sys.argv, "--kind", kind], check=True)


def measure(args: argparse.Namespace) -> None:
    """One kind, in this process."""
    layers = load_run_config([], args.overrides, args.preset, rules=False).model.layers
    chosen = [text.format(half=layers // 2) for text in KINDS[args.kind]]
    config = load_run_config([], [*args.overrides, *chosen], args.preset, rules=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state = build_state(config, Mesh(), device, resume=False)
    micro, length = config.batch.micro_batch, config.data.seq_length
    times = [step(config, state, 1, 8, device)]  # allocates gradients and moments
    base = memory(device)
    times = [step(config, state, micro, length, device) for _ in range(args.steps + 1)][1:]
    peak = memory(device) - base
    print(f"{args.kind:18} {statistics.median(times) * 1e3:8.0f} ms   {peak / 2**30:6.2f} GiB", flush=True)


def step(config, state, micro: int, length: int, device: torch.device) -> float:
    ids = torch.randint(config.model.vocab_size, (micro, length + 1))
    batch = {"tokens": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": torch.ones(micro, length)}
    start = time.perf_counter()
    backward(state.model, state.data_parallel, [batch], micro * length, device)
    reduce(state.data_parallel)
    update(state.data_parallel, state.optimizer, lr=1e-4, clip_norm=1.0)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def memory(device: torch.device) -> int:
    """The highest so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
