"""What `make quickstart` runs, with a smaller model and batch: every step for real, in a fresh directory.

The script runs in this process, so that its `mt` commands are forks, as those of pages are. The tutorial's are real.
"""

import json
import runpy
import sys

from docs.pages import ROOT


def test_the_quickstart_makes_all_it_promises(tmp_path, monkeypatch, capfd):
    script = ROOT / "examples" / "quickstart" / "quickstart.py"
    small = ["model.layers=1", "model.mlp.ffn_hidden_size=64", "runtime.threads=1"]
    small += ["batch.micro_batch=2", "batch.global_batch=2"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "out"), *small])
    runpy.run_path(str(script), run_name="__main__")
    stdout, stderr = capfd.readouterr()
    for shown in ("stopped with its state saved; exit code 143", "verified: result in mt = result in transformers"):
        assert shown in stdout
    assert "mt: resuming from run/step-" in stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 1
    table = stdout[stdout.index("Made in") :]
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
