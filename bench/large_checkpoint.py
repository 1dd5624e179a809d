"""Save a large model with its optimizer's state while it trains, and load it under another layout.

usage: large_checkpoint.py PRESET --nproc N --folder DIR [--save k=v …] [--load k=v …] [--set k=v …]

Trains under the first layout with an asynchronous save in the middle, then goes on from there under the second. Prints
the pause, the time to write, the bytes, the steps' times before and during the save, the time to load, and the losses
of the steps that both runs made.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from training import random_corpus

from mt_cli.run_config import load_run_config

SAVED, STEPS = 4, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("preset")
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--folder", type=Path, required=True)
    for name in ("save", "load", "set"):
        parser.add_argument(f"--{name}", nargs="*", default=[])
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    common = [f"data.paths=['{args.folder / 'random'}']", "data.split=1,0,0", f"runtime.run_dir={args.folder / 'run'}"]
    common += ["log.every=1", "lr_schedule.warmup_steps=1", *args.set]
    common += [f"train.steps={STEPS}", "checkpoint.at_end=false"]
    config = load_run_config([], common, args.preset, rules=False)
    tokens = STEPS * config.batch.global_batch * config.data.seq_length + 1
    random_corpus(args.folder / "random", config.model.vocab_size, tokens)
    train(args, [*common, f"checkpoint.every={SAVED}", "checkpoint.async_save=true", *args.save])
    first = metrics(args.folder)
    for saved in (line for line in first if "saved_step" in line):
        print(
            f"step {saved['saved_step']}: {saved['save_bytes'] / 1e9:.1f} GB, pause {saved['save_pause_s']:.2f} s, "
            f"written in {saved['save_write_s']:.1f} s ({saved['save_bytes'] / 1e9 / saved['save_write_s']:.2f} GB/s)"
        )
    before = statistics.median(line["step_ms"] for line in first if "step_ms" in line and 1 < line["step"] <= SAVED)
    during = statistics.median(line["step_ms"] for line in first if "step_ms" in line and line["step"] > SAVED)
    print(f"steps: {before:.0f} ms before the save, {during:.0f} ms during it")
    said = train(args, [*common, *args.load])
    print(f"under another layout: {re.findall('mt: loaded in .*', said)}")
    for name, lines in (("first", first), ("second", metrics(args.folder))):
        print(name, [round(line["loss"], 4) for line in lines if "loss" in line and line["step"] > SAVED])


def train(args: argparse.Namespace, overrides: list[str]) -> str:
    (args.folder / "empty.toml").touch()
    options = [part for text in overrides for part in ("--set", text)]
    command = [sys.executable, "-c", "from mt_cli.main import main; main()", "train", str(args.folder / "empty.toml")]
    done = subprocess.run(
        [*command, "--preset", args.preset, *options, "--nproc", str(args.nproc)], text=True, capture_output=True
    )
    print(done.stdout, done.stderr, file=sys.stderr)
    done.check_returncode()
    return done.stderr


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    main()
