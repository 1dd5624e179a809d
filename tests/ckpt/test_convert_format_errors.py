"""Training states that cannot be moved: each is told what is wrong, and nothing is left behind."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ckpt.legacy_files import random_weights
from ckpt.test_convert_format import contents, state_of_a_run
from ckpt.test_megatron_encoders import BERT
from ckpt.test_megatron_round_trip import config_of
from mt_ckpt.convert_format.bucket_space import tensors
from mt_ckpt.convert_format.convert import Target, convert_format, prove
from mt_ckpt.convert_format.flattened import unflattened
from mt_ckpt.convert_format.read_native import read_native
from mt_ckpt.megatron import pickles
from mt_ckpt.megatron.dist_metadata import Stored
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.names import parameters
from mt_ckpt.megatron.saver import save
from mt_core.checkpoint.native import step_directory
from mt_core.checkpoint.writing import write
from mt_core.errors import MtError

EXPERTS: dict[str, Any] = {
    "mlp": {"kind": "moe", "size": 8, "experts": 4, "top_k": 2, "normalized": True, "balance": 0.0}
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return state_of_a_run(tmp_path_factory.mktemp("errors") / "run")


def refused(source: Path, target: Path, message: str, to: str = "native") -> None:
    with pytest.raises(MtError, match=message):
        convert_format(source, target, Target(to))
    assert not target.exists()


def edited(file: Path, edit: Any) -> None:
    """A file of torch.save with its contents passed through `edit`."""
    held = pickles.read(file)
    held = edit(held) or held
    torch.save(held, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)


def only_group(held: Any) -> None:
    held["optimizer"]["optimizer"]["param_groups"][1]["wd_mult"] = 0.5


def short_group(held: Any) -> None:
    held["optimizer"]["optimizer"]["param_groups"][0]["params"].pop()


def short_moment(held: Any) -> None:
    held["optimizer"]["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)


def two_optimizers(held: Any) -> None:
    held["optimizer"] = [held["optimizer"], held["optimizer"]]


def with_experts(held: Any) -> None:
    vars(held["args"]).update(num_experts=4, moe_ffn_hidden_size=8)


STATE, VECTORS = "model_optim_rng.pt", "distrib_optim.pt"
BROKEN = {
    "group": ("plain", STATE, only_group, "none of the 2 parameter groups is for it"),
    "ids": ("plain", STATE, short_group, "parameter group 0 has only 17 parameters"),
    "moment": ("plain", STATE, short_moment, r"exp_avg has shape \(3,\); copy it again"),
    "two optimizers": ("plain", STATE, two_optimizers, "2 optimizers; only runs with one optimizer can be converted"),
    "experts": (
        "plain",
        STATE,
        with_experts,
        "experts have optimizers of their own in torch format; save it in torch_d",
    ),
    "scheduler": (
        "plain",
        STATE,
        lambda held: held.pop("opt_param_scheduler") and None,
        "no state of the learning rate",
    ),
    "old vectors": (
        "distributed",
        VECTORS,
        lambda held: held.pop("buckets_coalesced") and None,
        "before February 2024",
    ),
    "dtypes": ("distributed", VECTORS, lambda held: held | {1: held[0]}, "2 kinds of parameters in 1 chunks; only one"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_rank_files_that_are_not_as_megatron_writes_them(case, run, tmp_path):
    optimizer, file, edit, message = BROKEN[case]
    convert_format(run, tmp_path / "there", Target("torch", optimizer=optimizer))
    edited(tmp_path / "there" / "iter_0000007" / "mp_rank_00" / file, edit)
    refused(tmp_path / "there", tmp_path / "back", message)


def rewritten(run: Path, path: Path, dtype: str = "bf16", **changes: Any) -> Path:
    """The native run with other tensors of its optimizer; None leaves one out."""
    step = step_directory(run, 7)
    model, optim = (load_file(next((step / part).glob("*.safetensors"))) for part in ("model", "optim"))
    optim = {name: tensor for name, tensor in (optim | changes).items() if tensor is not None}
    meta = json.loads((step / "meta.json").read_text())
    meta["config"]["precision"]["dtype"] = dtype
    kept = {name: meta[name] for name in ("step", "samples", "tokens", "loss_scale", "config")}
    write(step_directory(path, 7), {"model": model.items(), "optim": optim.items()}, kept)
    return path


def test_a_native_optimizer_that_is_not_adamws(run, tmp_path):
    one, two = "exp_avg.norm.weight", "momentum.norm.weight"
    source = rewritten(run, tmp_path / "odd", **{one: None, two: torch.zeros(16)})
    refused(source, tmp_path / "there", f"{one}: tensor is missing; only AdamW(.|\n)*{two}: unexpected tensor", "torch")


def test_parameters_that_took_different_steps(run, tmp_path):
    source = rewritten(run, tmp_path / "odd", **{"step.norm.weight": torch.tensor(5.0)})
    refused(
        source, tmp_path / "there", r"optimizer steps differ between parameters: \[5, 7\]; Megatron counts", "torch"
    )


def test_fp64_has_no_place(run, tmp_path):
    source = rewritten(run, tmp_path / "wide", "fp64")
    refused(source, tmp_path / "there", "was trained in fp64; Megatron's optimizers are fp32", "torch")


def test_experts_move_in_torch_dist_alone(tmp_path):
    run = state_of_a_run(tmp_path / "run", **EXPERTS)
    convert_format(run, tmp_path / "there", Target("torch_dist", expert=2), verify=True)
    convert_format(tmp_path / "there", tmp_path / "back", Target("native"))
    assert contents(tmp_path / "back") == contents(run)
    refused(run, tmp_path / "files", "experts in torch format with --target-optimizer distributed", "torch")


def test_a_torch_dist_optimizer_that_lacks_a_moment(run, tmp_path):
    convert_format(run, tmp_path / "there", Target("torch_dist"))
    file = tmp_path / "there" / "iter_0000007" / ".metadata"
    held = pickle.loads(file.read_bytes())
    held.state_dict_metadata = {k: v for k, v in held.state_dict_metadata.items() if ".exp_avg." not in k}
    held.storage_data = {at: v for at, v in held.storage_data.items() if at.fqn in held.state_dict_metadata}
    file.write_bytes(pickle.dumps(held))
    refused(
        tmp_path / "there", tmp_path / "back", "holds no exp_avg, but optimizer.{state}; layouts that can be read: "
    )


def test_flat_pieces_of_another_shape():
    one = Stored((2, 1, 30), original=(2, 8))
    with pytest.raises(MtError, match=r"is stored as \(2, 1, 30\), which does not hold pieces of \(2, 8\)"):
        unflattened("key", one)


def test_a_bucket_with_a_hole():
    slots = {name: {0: (Stored((10**6,)), 0)} for name in parameters(config_of())}
    with pytest.raises(MtError, match="lacks elements 0 to"):
        list(tensors(slots, config_of(), Layout(1, 1, 1, engine=True), 64))


def test_a_result_that_is_not_read_back_as_it_was(run, tmp_path):
    convert_format(run, tmp_path / "there", Target("torch_dist"))
    other = read_native(state_of_a_run(tmp_path / "other", seed=1))
    with pytest.raises(MtError, match="model embed.weight: is not read back as it was; the result was removed"):
        prove(tmp_path / "there", "torch_dist", other)


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_a_state_of_another_model_than_gpt_is_refused(form, tmp_path):
    weights = random_weights(BERT).items()
    save(tmp_path / "bert", BERT, weights, target_ckpt_format=form, target_iteration=4)
    refused(tmp_path / "bert", tmp_path / "moved", "holds a 'bert' model")


def test_a_run_of_another_model_than_gpt_is_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    file = step_directory(tmp_path / "run", 7) / "meta.json"
    meta = json.loads(file.read_text())
    meta["config"]["model"] = BERT.model_dump(mode="json")
    file.write_text(json.dumps(meta))
    refused(tmp_path / "run", tmp_path / "moved", "holds a 'bert' model", "torch")
