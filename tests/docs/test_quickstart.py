"""What `make quickstart` runs, with a smaller model: every step for real, in a fresh directory."""

import json
import subprocess
import sys

from docs.pages import ROOT


def test_the_quickstart_makes_all_it_promises(tmp_path):
    script = ROOT / "examples" / "quickstart" / "quickstart.py"
    small = ["model.layers=1", "model.mlp.ffn_hidden_size=64", "runtime.threads=1"]
    command = [sys.executable, str(script), str(tmp_path / "out"), *small]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for shown in ("stopped with its state saved; exit code 143", "verified: result in mt = result in transformers"):
        assert shown in ran.stdout
    assert "mt: resuming from run/step-" in ran.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 1
    table = ran.stdout[ran.stdout.index("Made in") :]
    for made in (
        "tokenizer",
        "tokens",
        "model, loss",
        "metrics",
        "Hugging Face model",
        "held-out perplexity",
        "sample",
    ):
        assert made in table
