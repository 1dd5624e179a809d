"""`torch_dist` files with `singleton_local_shards`, made by megatron-core: the same bits as in the ordinary form."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch

from ckpt.megatron.core_models import build_their_gpt, without_cuda
from ckpt.megatron.test_oracle import config_for
from mt_ckpt.megatron.args.gpt import write_args
from mt_ckpt.megatron.dist_format.metadata import read_metadata
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.loader import MegatronCoreLoader
from mt_core.distributed.mesh import Axis
from mt_core.errors import MtError
from mt_core.verification.ranks import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("megatron_core")]

CASES = ("llama", "gpt2", "experts")
FORMS: dict[str, dict[str, Any]] = {"ordinary": {}, "singleton": {"singleton_local_shards": True}}


@torch.no_grad()
def save_both(axis: Axis, room: Path) -> None:
    """Save each model in both forms."""
    from megatron.core import dist_checkpointing

    from parallel.test_against_megatron_core import initialize_megatron

    initialize_megatron(axis)
    without_cuda()
    for case in CASES:
        config = config_for(case)
        model = build_their_gpt(axis, config)
        args = write_args(config, Layout(axis.size, 1, 1, engine=False), dtype=torch.float32, form="torch_dist")
        for form, metadata in FORMS.items():
            (room / case / form).mkdir(parents=True, exist_ok=True)
            tensors = model.sharded_state_dict(metadata=metadata)
            dist_checkpointing.save({**tensors, "args": args}, str(room / case / form), content_metadata=metadata)


@cache
def saved() -> Path:
    room = Path(mkdtemp())
    run_ranks(2, save_both, room)
    return room


@pytest.mark.parametrize("case", CASES)
def test_both_forms_are_the_same_model(case):
    loaders = {form: MegatronCoreLoader(saved() / case / form) for form in FORMS}
    ordinary, singleton = (dict(loader.tensors()) for loader in loaders.values())
    assert loaders["ordinary"].config() == loaders["singleton"].config()
    assert {*ordinary} == {*config_for(case).canonical_shapes()} == {*singleton}
    assert all(torch.equal(ordinary[name], singleton[name]) for name in ordinary)


def test_the_files_have_the_keys_that_the_form_is_about():
    keys = {case: read_metadata(saved() / case / "singleton") for case in CASES}
    fc1 = {key for key in keys["llama"] if "linear_fc1.weight" in key and "layers.1." in key}
    assert fc1 == {f"decoder.layers.1.mlp.linear_fc1.weight_{part}" for part in "wv"}
    assert "decoder.layers.0.mlp.experts.experts.3.linear_fc1.weight_v" in keys["experts"]
    assert "decoder.layers.0.mlp.linear_fc1.bias" in keys["gpt2"]


def test_a_gate_without_its_other_half_is_refused(monkeypatch):
    def without_up(directory):
        stored = read_metadata(directory)
        del stored["decoder.layers.1.mlp.linear_fc1.weight_v"]
        return stored

    monkeypatch.setattr("mt_ckpt.megatron.dist_format.reader.read_metadata", without_up)
    loader = MegatronCoreLoader(saved() / "llama" / "singleton")
    with pytest.raises(MtError) as refused:
        list(loader.tensors())
    assert [problem.actual for problem in refused.value.problems] == ["tensor is missing", "unexpected tensor"]
