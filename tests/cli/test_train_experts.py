"""What `mt train` logs of a mixture of experts: loads, entropy and dropped choices are those of one rank."""

import subprocess
import sys
from pathlib import Path

import pytest

from mt_models.config import MoE
from tiny import byte_corpus, metrics, run_toml

pytestmark = pytest.mark.slow

NAMES = ("loss", "grad_norm", "expert_load_max", "expert_load_min", "router_entropy", "dropped_share")
LAYOUTS = {
    "one": (1, []),
    "expert 2": (2, ["parallel.expert=2", "parallel.token_dispatcher=all_gather"]),
    "pipeline 2": (2, ["parallel.pipeline=2", "recompute.granularity=full"]),
}


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> dict[str, list[dict]]:
    """The lines of metrics.jsonl of each layout."""
    folder: Path = tmp_path_factory.mktemp("experts")
    corpus = byte_corpus(folder / "bytes_text_document")
    mlp = MoE(ffn_hidden_size=24, experts=4, top_k=2, aux_loss_coeff=0.1, capacity_factor=1.0, shared_ffn_hidden_size=8)
    path = run_toml(
        folder / "run.toml",
        corpus,
        folder / "unused",
        model={"mlp": mlp.model_dump(mode="json", exclude_none=True)},
        batch={"micro_batch": 1},
        train={"steps": 3},
        precision={"dtype": "fp64"},
    )
    for name, (ranks, changes) in LAYOUTS.items():
        words = [word for each in [*changes, f"runtime.run_dir={folder / name}"] for word in ("--set", each)]
        arguments = ["train", str(path), "--nproc", str(ranks), *words]
        done = subprocess.run([sys.executable, "-m", "mt_cli", *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return {name: [line for line in metrics(folder / name) if "loss" in line] for name in LAYOUTS}


def test_loads_dropped_tokens_and_entropy_are_in_every_line(logged):
    assert len(logged["one"]) == 3
    for line in logged["one"]:
        assert 0 <= line["expert_load_min"] < 1 < line["expert_load_max"] <= 2
        assert 0 < line["router_entropy"] < 1.3863  # ln 4
        assert 0 < line["dropped_share"] < 0.5


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_every_layout_logs_what_one_rank_does(layout, logged):
    for ours, theirs in zip(logged[layout], logged["one"], strict=True):
        assert [ours[name] for name in NAMES] == pytest.approx([theirs[name] for name in NAMES], rel=1e-12)
