"""Training states that cannot be moved: each is told what is wrong, and nothing is left behind."""

import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ckpt.megatron.test_encoders import BERT, T5
from ckpt.megatron.test_round_trip import build_config
from ckpt.megatron.training_state.test_convert_format import EXPERTS, write_run
from mt_ckpt.megatron.args.t5 import NORM_NOTES
from mt_ckpt.megatron.dist_format.metadata import Stored
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.optimizer.dp_reshardable import tensors
from mt_ckpt.megatron.optimizer.fully_sharded_model_space import unflatten
from mt_ckpt.megatron.parameters.names import list_parameters
from mt_ckpt.megatron.placement import place_parameters
from mt_ckpt.megatron.torch_format import safe_unpickle
from mt_ckpt.megatron.training_state.convert import Target, convert_format, verify_result
from mt_ckpt.megatron.training_state.read_native import read_native
from mt_ckpt.native.loader import Native
from mt_core.checkpoint.native import step_directory
from mt_core.checkpoint.step_writer import write
from mt_core.errors import MtError


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("errors") / "run")


def refused(source: Path, target: Path, message: str, to: str = "native") -> None:
    with pytest.raises(MtError, match=message):
        convert_format(source, target, Target(to))
    assert not target.exists()


def edit_file(file: Path, edit: Any) -> None:
    """A file of torch.save with its contents passed through `edit`."""
    state = safe_unpickle.read(file)
    state = edit(state) or state
    torch.save(state, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)


def only_group(state: Any) -> None:
    state["optimizer"]["optimizer"]["param_groups"][1]["wd_mult"] = 0.5


def short_group(state: Any) -> None:
    state["optimizer"]["optimizer"]["param_groups"][0]["params"].pop()


def short_moment(state: Any) -> None:
    state["optimizer"]["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)


def two_optimizers(state: Any) -> None:
    state["optimizer"] = [state["optimizer"], state["optimizer"]]


STATE, VECTORS = "model_optim_rng.pt", "distrib_optim.pt"
BROKEN = {
    "group": ("plain", STATE, only_group, "none of the 2 parameter groups is for it"),
    "ids": ("plain", STATE, short_group, "parameter group 0 has only 17 parameters"),
    "moment": ("plain", STATE, short_moment, r"exp_avg has shape \(3,\); copy it again"),
    "two optimizers": ("plain", STATE, two_optimizers, "2 optimizers where args say 1 expert ranks; runs with 1 can"),
    "scheduler": (
        "plain",
        STATE,
        lambda state: state.pop("opt_param_scheduler") and None,
        "no state of the learning rate",
    ),
    "old vectors": (
        "distributed",
        VECTORS,
        lambda state: state.pop("buckets_coalesced") and None,
        "before February 2024",
    ),
    "two vectors": (
        "distributed",
        VECTORS,
        lambda state: [state, state],
        "vectors of 2 optimizers where args say 1 expert ranks; those of 1",
    ),
    "dtypes": (
        "distributed",
        VECTORS,
        lambda state: state | {1: state[0]},
        "2 kinds of parameters in 1 chunks; only one",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_rank_files_that_are_not_as_megatron_writes_them(case, run, tmp_path):
    optimizer, file, edit, message = BROKEN[case]
    convert_format(run, tmp_path / "there", Target("torch", optimizer=optimizer))
    edit_file(tmp_path / "there" / "iter_0000007" / "mp_rank_00" / file, edit)
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


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Path:
    """`torch` files of two expert ranks."""
    room = tmp_path_factory.mktemp("experts")
    convert_format(write_run(room / "run", **EXPERTS), room / "there", Target("torch", expert=2))
    return room / "there"


def test_vectors_that_all_expert_ranks_share_are_in_the_first_ones_file(experts, tmp_path):
    shutil.copytree(experts, tmp_path / "there")
    files = [tmp_path / "there" / "iter_0000007" / f"mp_rank_00_00{rank}" / VECTORS for rank in range(2)]
    assert [[part is None for part in safe_unpickle.read(file)] for file in files] == [[False, False], [True, False]]
    edit_file(files[0], lambda vectors: [None, vectors[1]])
    refused(tmp_path / "there", tmp_path / "back", "embed.*stored by 0 ranks; all 2 should have it")


def test_experts_with_settings_of_their_own_are_reported(experts, tmp_path):
    def other(state: Any) -> None:
        state["optimizer"][1]["optimizer"]["param_groups"][0]["lr_mult"] = 2.0

    shutil.copytree(experts, tmp_path / "there")
    edit_file(tmp_path / "there" / "iter_0000007" / "mp_rank_00_000" / STATE, other)
    message = "settings of the experts' parameter group, which differ from those of the others"
    assert message in convert_format(tmp_path / "there", tmp_path / "back", Target("native")).lost
    assert message not in convert_format(experts, tmp_path / "same", Target("native")).lost


def test_a_torch_dist_optimizer_that_lacks_a_moment(run, tmp_path):
    convert_format(run, tmp_path / "there", Target("torch_dist"))
    file = tmp_path / "there" / "iter_0000007" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.state_dict_metadata = {k: v for k, v in metadata.state_dict_metadata.items() if ".exp_avg." not in k}
    metadata.storage_data = {at: v for at, v in metadata.storage_data.items() if at.fqn in metadata.state_dict_metadata}
    file.write_bytes(pickle.dumps(metadata))
    refused(
        tmp_path / "there", tmp_path / "back", "holds no exp_avg, but optimizer.{state}; layouts that can be read: "
    )


def test_flat_pieces_of_another_shape():
    one = Stored((2, 1, 30), original=(2, 8))
    with pytest.raises(MtError, match=r"is stored as \(2, 1, 30\), which does not hold pieces of \(2, 8\)"):
        unflatten("key", one)


def test_a_bucket_with_a_hole():
    slots = {name: {0: (Stored((10**6,)), 0)} for name in list_parameters(build_config())}
    with pytest.raises(MtError, match="lacks elements 0 to"):
        list(tensors(slots, place_parameters(build_config(), Layout(1, 1, 1, engine=True))))


def test_a_result_that_is_not_read_back_as_it_was(run, tmp_path):
    convert_format(run, tmp_path / "there", Target("torch_dist"))
    other = read_native(write_run(tmp_path / "other", seed=1))
    with pytest.raises(MtError, match="model embed.weight: is not read back as it was; the result was removed"):
        verify_result(tmp_path / "there", "torch_dist", other)


def test_a_run_of_a_plugins_model_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Native, "config", lambda _: SimpleNamespace(kind="mamba"))
    refused(run, tmp_path / "moved", "holds a 'mamba' model; Megatron's files hold gpt, bert and t5", "torch")


CANNOT = {
    "stages": (T5, {"pipeline": 3}, "the optimizer of a T5 on 3 pipeline stages; one stage; or mt ckpt convert"),
    "head": (BERT.model_copy(update={"head_activation": "relu"}), {}, "cannot carry head_activation = 'relu'"),
    "no experts": (BERT, {"grouped": True}, "--moe-grouped-gemm: the model has no experts; leave it out"),
    "grouped": (
        build_config(**EXPERTS),
        {"grouped": True, "implementation": "local"},
        "--moe-grouped-gemm: Megatron's own grouped experts are gone",
    ),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_megatrons_models_cannot_be(case, tmp_path):
    model, target, message = CANNOT[case]
    with pytest.raises(MtError, match=message):
        convert_format(write_run(tmp_path / "run", model), tmp_path / "there", Target("torch", **target))
    assert not (tmp_path / "there").exists()


def test_the_norm_that_newer_releases_lack_is_named(tmp_path):
    run = write_run(tmp_path / "run", T5)
    assert NORM_NOTES[True] in convert_format(run, tmp_path / "there", Target("torch_dist")).hints


def test_a_run_with_frozen_parameters_has_no_state_for_them(run, tmp_path):
    source = rewritten(run, tmp_path / "run")
    meta = step_directory(source, 7) / "meta.json"
    values = json.loads(meta.read_text())
    values["config"]["optim"]["trainable"] = ["layers.*"]
    meta.write_text(json.dumps(values))
    message = (
        r"optim.trainable: 3 of \d+ tensors, embed.weight the first, are frozen and have no optimizer state; "
        r"training state in Megatron's formats covers every tensor; mt ckpt convert writes the weights alone"
    )
    refused(source, tmp_path / "there", message, to="torch")
