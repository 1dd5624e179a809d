"""What Megatron-Core 0.11.0 itself saved comes out as the values that it held (golden_0_11/README.md)."""

import tarfile
from pathlib import Path

import pytest
import torch

from mt_ckpt.megatron.dist_format.metadata import Stored, read_metadata
from mt_ckpt.megatron.training_state.convert import Target, convert_format

GOLDEN = Path(__file__).parent / "golden_0_11"


@pytest.fixture(scope="module", params=["dense", "experts"])
def saved(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("0_11")
    with tarfile.open(GOLDEN / f"{request.param}.tar.xz") as archive:
        archive.extractall(path, filter="data")
    return path


def whole(stored: Stored) -> torch.Tensor:
    assert stored.size is not None
    tensor = torch.full(stored.size, float("nan"))
    for chunk in stored.chunks:
        tensor[tuple(slice(at, at + n) for at, n in zip(chunk.offsets, chunk.sizes, strict=True))] = (
            chunk.read().float()
        )
    return tensor


@pytest.mark.parametrize("form", ["sharded", "torch"])
def test_its_optimizer_is_rewritten_for_todays_megatron_with_every_value(saved, form, tmp_path):
    expected = torch.load(saved / "held.pt")
    convert_format(saved / form, tmp_path / "new", Target("torch_dist"), verify=True)
    stored = read_metadata(tmp_path / "new" / "iter_0000002")
    for kind in ("model", "param", "exp_avg", "exp_avg_sq"):
        prefix = "" if kind == "model" else f"optimizer.state.{kind}."
        wrong = [
            key for key, right in expected[kind].items() if not torch.equal(whole(stored[prefix + key]), right.float())
        ]
        assert not wrong, kind
        assert expected[kind]
