"""From raw text to a trained, resumed, converted and evaluated model: every step is one `mt` command, shown and run.

usage: quickstart.py OUT_DIR [section.field=value …]      OUT_DIR is emptied first; all commands run inside it
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
MT = str(Path(sys.executable).with_name("mt"))
STOP_AT = 150
"""The first training run is stopped about here, to show that it resumes."""


def main(out: Path, overrides: list[str]) -> None:
    """Run every step; stop at the first that fails."""
    start = time.monotonic()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    os.chdir(out)
    here = os.path.relpath(HERE)
    print(f"$ cd {out}")
    show("Text: the sources of the Python standard library on this machine")
    call(sys.executable, f"{here}/corpus.py", "corpus")
    show("Tokenizer: byte-level BPE, trained on it")
    train_text = ["--input", "corpus/train.jsonl"]
    call(MT, "data", "train-tokenizer", *train_text, "--vocab-size", "4096", "--output-dir", "tokenizer")
    show("Tokens: .bin/.idx files, byte-compatible with Megatron's")
    tokenizer = ["--vocab-file", "tokenizer/vocab.json", "--merge-file", "tokenizer/merges.txt"]
    call(MT, "data", "preprocess", *train_text, "--output-prefix", "data/train", *tokenizer, "--append-eod")
    train = [MT, "train", f"{here}/run.toml", *(part for text in overrides for part in ("--set", text))]
    show(f"Training, stopped by SIGTERM after step {STOP_AT}")
    call_until(Path("run/metrics.jsonl"), STOP_AT, *train)
    show("Training again with the same command: it resumes where it stopped")
    call(*train)
    show("Hugging Face: converted, and proven to compute the same")
    native, hugging_face = ["--loader", "native", "--load-dir", "run"], ["--saver", "hf", "--save-dir", "hf"]
    call(MT, "ckpt", "convert", *native, *hugging_face, "--verify")
    show("Evaluation on held-out text")
    heldout = ["--data", "corpus/heldout.jsonl"]
    call(MT, "eval", "perplexity", "--load-dir", "run", *heldout, "--output", "perplexity.json")
    show("A sample")
    sample = ["--temperature", "0.8", "--top-k", "40", "--seed", "1"]
    text = call(MT, "generate", "--load-dir", "hf", "--prompt", "def", "--max-new-tokens", "60", *sample)
    closing_table(out, text.strip(), time.monotonic() - start)


def show(text: str) -> None:
    """A heading."""
    Console().print(f"\n[bold]{text}[/bold]")


def echo(command: Sequence[str]) -> None:
    """Print a command as one would type it."""
    print("$", shlex.join([Path(command[0]).name, *command[1:]]), flush=True)


def call(*command: str) -> str:
    """Show a command, run it, pass its output through and return it."""
    echo(command)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout or ():
        print(line, end="", flush=True)
        lines.append(line)
    if process.wait():
        raise SystemExit(f"quickstart: {command[1]} failed with exit code {process.returncode}")
    return "".join(lines)


def call_until(metrics: Path, step: int, *command: str) -> None:
    """Run a training command and send it SIGTERM once metrics.jsonl has reached `step`."""
    echo(command)
    process = subprocess.Popen(command)
    while process.poll() is None and last_step(metrics) < step:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    if process.wait() != 128 + signal.SIGTERM:
        raise SystemExit(f"quickstart: training ended with exit code {process.returncode}, not by SIGTERM")
    print(f"stopped with its state saved; exit code {process.returncode}")


def last_step(metrics: Path) -> int:
    """Step of the last whole line of metrics.jsonl; 0 if there is none."""
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def closing_table(out: Path, sample: str, seconds: float) -> None:
    """What was made, and where."""
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    scores = json.loads(Path("perplexity.json").read_text())["metrics"]
    table = Table("what", "where", title=f"Made in {seconds:.0f} s", title_justify="left")
    table.columns[1].overflow = "fold"
    for what, where in (
        ("tokenizer, 4,096 ids", out / "tokenizer"),
        ("tokens", out / "data" / "train_text_document.bin"),
        (f"model, loss {losses[0]:.2f} → {losses[-1]:.2f} in {lines[-1]['step']} steps", out / "run"),
        ("metrics, a line a logged step", out / "run" / "metrics.jsonl"),
        ("Hugging Face model", out / "hf"),
        (f"held-out perplexity {scores['perplexity']:.1f}", out / "perplexity.json"),
        ("sample", " ".join(sample.split())[:60]),
    ):
        table.add_row(what, str(where))
    Console().print(table)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
