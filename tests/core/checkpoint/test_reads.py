"""Loading under another layout: together, the ranks of a node fetch each byte of the checkpoint from the disk once."""

import os
from pathlib import Path

import pytest
import torch

from mt_core.checkpoint.native import resolve, write_model
from mt_core.checkpoint.shard_files import check_names
from mt_core.verification.ranks import run_ranks
from mt_models.canonical import canonical_state
from tiny import built, llama

SIZES = {"hidden_size": 256, "vocab_size": 8191, "layers": 4}  # 25 MB in fp32
TENSOR = 2


def fetched() -> int:
    """Bytes that the disk has given because of this process; what is in the page cache counts nothing."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def load_share(axis, step):
    """Fill a tensor rank's parameters; the bytes that it fetched, and those of the parameters."""
    config, before = llama(**SIZES), fetched()
    saved = check_names(step / "model", config.canonical_shapes())
    model, used = config.build(TENSOR), 0
    for name, _ in model.named_parameters():
        used += model.from_canonical(name, saved.__getitem__, axis.rank % TENSOR, TENSOR).nbytes
    return fetched() - before, used


@pytest.fixture
def step(tmp_path):
    """A checkpoint that one rank wrote, no longer in the page cache."""
    config = llama(**SIZES)
    state = canonical_state(built(config, dtype=torch.float32))
    write_model(tmp_path / "run", config.model_dump(mode="json"), state.items())
    for file in (resolve(tmp_path / "run") / "model").iterdir():
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return resolve(tmp_path / "run")


def test_each_byte_is_fetched_once_by_all_ranks_of_a_node(step):
    size = sum(file.stat().st_size for file in (step / "model").iterdir())
    found = run_ranks(2 * TENSOR, load_share, step)  # two replicas of each tensor rank
    if not sum(fetches for fetches, _ in found):
        pytest.skip("this file system keeps its files in memory")
    assert sum(used for _, used in found) > 1.9 * size  # together they use every byte twice
    assert 0.95 * size < sum(fetches for fetches, _ in found) < 1.05 * size
