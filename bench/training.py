"""Time `mt train` itself on random tokens: everything is in the step (loading, loss, clipping, optimizer, logging).

usage: training.py RUN.toml|PRESET [--steps 30] [--warmup 10] [--set section.field=value …]

Prints medians of the timed steps: ms, tokens/s a rank, TFLOP/s (causal attention at half), and peak memory; of a
mixture also how evenly its experts were chosen.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from mt_cli.run_config import load_run_config
from mt_core.parallel.expert.balance import METRICS
from mt_data.indexed.writer import IndexedWriter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("config", help="a TOML file, or a preset's name")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], dest="overrides")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = run(args, Path(folder))
    timed = [line for line in lines if "step_ms" in line and line["step"] > args.warmup]
    report(args, lines, timed)


def run(args: argparse.Namespace, folder: Path) -> list[dict]:
    """Lines of metrics.jsonl of a run of warm-up and timed steps."""
    files, preset = ([Path(args.config)], None) if args.config.endswith(".toml") else ([], args.config)
    overrides = [
        f"train.steps={args.warmup + args.steps}",
        "lr_schedule.warmup_steps=2",
        "log.every=1",
        "checkpoint.at_end=false",
        "data.split=1,0,0",
        f"data.paths=['{folder / 'random'}']",
        f"runtime.run_dir={folder / 'run'}",
        *args.overrides,
    ]
    config = load_run_config(files, overrides, preset, rules=False)
    samples = config.train.steps * config.batch.global_batch
    random_corpus(folder / "random", config.model.vocab_size, samples * config.data.seq_length + 1)
    options = [part for text in overrides for part in ("--set", text)]
    (folder / "empty.toml").touch()
    source = [args.config] if files else [str(folder / "empty.toml"), "--preset", args.config]
    command = [sys.executable, "-c", "from mt_cli.main import main; main()", "train", *source, *options]
    subprocess.run([*command, "--nproc", str(args.nproc)], check=True, stdout=sys.stderr)
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def random_corpus(prefix: Path, vocab_size: int, tokens: int) -> None:
    """One document of uniform random ids."""
    with IndexedWriter(prefix, np.dtype("uint16" if vocab_size < 65500 else "int32")) as writer:
        ids = np.random.default_rng(0).integers(0, vocab_size, tokens)
        writer.add_document(ids, np.array([tokens]))


def report(args: argparse.Namespace, lines: list[dict], timed: list[dict]) -> None:
    """One line a figure."""
    ms = statistics.median(line["step_ms"] for line in timed)
    tflops = statistics.median(line["tflops_per_rank"] for line in timed)
    rate = statistics.median(line["tokens_per_s"] for line in timed) / args.nproc
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    share = f" ({tflops / 989 * 100:.1f}% of 989)" if torch.cuda.is_available() else ""
    peak = max((line.get("peak_memory_gib", 0) for line in lines), default=0)
    print(
        f"{args.config} {' '.join(args.overrides)} | {device} x{args.nproc}, torch {torch.__version__} | "
        f"{ms:.1f} ms/step (of {len(timed)}), {rate:,.0f} tokens/s/rank, {tflops:.2f} TFLOP/s/rank{share}, "
        f"peak {peak:.1f} GiB | loss {lines[0]['loss']:.3f} -> {lines[-1]['loss']:.3f}"
    )
    if routing := {name: statistics.median(line[name] for line in timed) for name in METRICS if name in timed[0]}:
        print("routing: " + ", ".join(f"{name} {value:.3f}" for name, value in routing.items()))


if __name__ == "__main__":
    main()
