"""Transformer Engine's models of Megatron-Core load what we write and compute the same, and we read what they save.

On one GPU; the models' own process does all of theirs at once, since it takes ten seconds to start. A conversion that
fails there fails the tests that ask for its result.
"""

import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

pytest.importorskip("transformer_engine")
pytest.importorskip("megatron.core")

from ckpt.megatron.legacy.legacy_checkpoints import random_weights
from ckpt.megatron.test_encoders_oracle import TOKENS_BT, our_logits
from ckpt.megatron.training_state.test_convert_format import RUN
from ckpt.megatron.training_state.test_convert_format_oracle import KEYS, METADATA
from ckpt.megatron.transformer_engine_models import (
    CASES,
    Case,
    Run,
    build,
    build_run,
    compute_their_logits,
    rank_directory,
    start,
    train_steps,
)
from mt_ckpt.conversion.verify import TOLERANCE
from mt_ckpt.conversion.verify import our_logits as our_gpt_logits
from mt_ckpt.megatron.args.model_types import model_args
from mt_ckpt.megatron.layout import RANK_FILE, TRACKER, Layout, iteration_name
from mt_ckpt.megatron.loader import MegatronCoreLoader
from mt_ckpt.megatron.optimizer.param_order import named_parameters
from mt_ckpt.megatron.parameters.names import second_names
from mt_ckpt.megatron.saver import save
from mt_ckpt.megatron.torch_format.writer import VERSION, written_name
from mt_ckpt.megatron.training_state.convert import Target, convert_format
from mt_ckpt.megatron.training_state.read_torch import read_torch
from mt_ckpt.megatron.training_state.read_torch_dist import read_torch_dist
from mt_ckpt.megatron.training_state.run_settings import build_scheduler, to_args
from mt_ckpt.megatron.training_state.state import KINDS
from mt_core.distributed.mesh import Axis
from mt_core.verification.ranks import run_ranks

pytestmark = pytest.mark.gpu

FORMS = ("torch", "torch_dist")
TRAINED = ("llama", "gpt2", "grouped experts", "sequential experts", "bert", "t5", "relative t5")
STORED = ("fully_reshardable", "dp_reshardable", "torch")
"""How their run stores its optimizer."""
STEP = 7


def get_saver_options(case: Case) -> dict[str, Any]:
    """Options of our saver."""
    return {"moe_grouped_gemm": True} if case.grouped else {}


def get_layout(case: Case) -> Layout:
    return Layout(1, 1, 1, engine=True, grouped=case.grouped)


def build_common(case: Case, form: str, dtype: torch.dtype, **args: Any) -> dict[str, Any]:
    """What their training saves beside tensors."""
    model_arguments = model_args(case.config, get_layout(case), dtype=dtype, form=form)
    vars(model_arguments).update(args)
    counts = {"iteration": STEP, "num_floating_point_operations_so_far": 0}
    return {"args": model_arguments, "checkpoint_version": VERSION, **counts}


def read_model(root: Path) -> dict[str, Any]:
    """The model's state in a `torch` checkpoint, as a stranger reads it."""
    return torch.load(rank_directory(root) / RANK_FILE, weights_only=False)["model"]


def load_model(model: Any, root: Path, form: str) -> None:
    """Every key that either has, the other must have."""
    from megatron.core import dist_checkpointing

    if form == "torch":
        state = read_model(root)
    else:
        (directory,) = (path for path in root.iterdir() if path.is_dir())
        loaded: Any = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(directory))
        state = loaded["model"]
    model.load_state_dict(state, strict=True)


def save_state(root: Path, form: str, state: dict[str, Any], **more: Any) -> Path:
    """Save as their training does; the directory of the iteration, or of its only rank."""
    from megatron.core import dist_checkpointing

    directory = root / iteration_name(STEP) / ("mp_rank_00" if form == "torch" else "")
    directory.mkdir(parents=True)
    (root / TRACKER).write_text(str(STEP))
    if form == "torch":
        torch.save(state, directory / RANK_FILE)
    else:
        dist_checkpointing.save(state, str(directory), **more)
    return directory


def save_model(root: Path, form: str, model: Any, common: dict[str, Any]) -> None:
    tensors = {"model": model.state_dict()} if form == "torch" else model.sharded_state_dict()
    save_state(root, form, {**common, **tensors})


def compute(room: Path, case: Case, form: str) -> tuple[list[Tensor], list[str], dict[str, Any]]:
    """Load ours and save it; logits, names of parameters, and shapes and dtypes of the state."""
    model = build(case).eval()
    load_model(model, room / f"ours {form}", form)
    logits = compute_their_logits(model, case.config.kind)
    save_model(room / f"theirs {form}", form, model, build_common(case, form, torch.float32))
    return logits, [name for name, _ in model.named_parameters()], count_shapes(model.state_dict())


def count_shapes(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value if value is None else (value.dtype, tuple(value.shape)) for name, value in state.items()}


def train_in_fp8(room: Path) -> dict[str, Any]:
    """Two steps from our weights; what the model then holds, which it saves."""
    case = CASES["llama"]
    model = build(case, bf16=True, params_dtype=torch.bfloat16, fp8="hybrid", fp8_recipe="delayed").bfloat16()
    load_model(model, room / "ours torch", "torch")
    train_steps(model, 2)
    for form in FORMS:
        save_model(room / f"theirs {form}", form, model, build_common(case, form, torch.bfloat16))
    return {name: value if value is None else value.cpu() for name, value in model.state_dict().items()}


def train(room: Path, case: Case) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Two steps from random weights, after which the run is stored every way: what it then holds, and after a third."""
    run = build_run(case)
    run.step(1)
    run.step(2)
    for stored in STORED:
        store(room / stored, stored, run, case)
    states = run.states(KEYS)
    run.step(3)
    return states, run.weights()


def store(root: Path, stored: str, run: Run, case: Case) -> None:
    form = "torch" if stored == "torch" else "torch_dist"
    settings = to_args({"precision": {"dtype": "bf16"}, **RUN})
    more = {"transformer_impl": "transformer_engine", "use_distributed_optimizer": True, "consumed_train_samples": 28}
    common = build_common(case, form, torch.bfloat16, **settings, **more, padded_vocab_size=case.config.vocab_rows(1))
    common["opt_param_scheduler"] = build_scheduler(settings, 28)
    if form == "torch":
        state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
        directory = save_state(root, form, {**common, **state})
        run.optimizer.save_parameter_state(str(directory / "distrib_optim.pt"))
    else:
        metadata = METADATA | {"distrib_optim_sharding_type": stored}
        shapes = run.model.sharded_state_dict(metadata=metadata)
        optimizer = run.optimizer.sharded_state_dict(shapes, metadata=metadata)
        save_state(root, form, {**common, **shapes, "optimizer": optimizer}, content_metadata=metadata)


def resume(room: Path, case: Case, stored: str, form: str) -> dict[str, Tensor]:
    """Their run goes on from what we make of its file; its weights after the third step."""
    from megatron.core import dist_checkpointing

    convert_format(room / stored, room / f"{stored} to {form}", Target(form), verify=True)
    run, directory = build_run(case), room / f"{stored} to {form}" / iteration_name(STEP)
    loaded: Any
    if form == "torch":
        loaded = torch.load(directory / "mp_rank_00" / RANK_FILE, weights_only=False)
        run.optimizer.load_state_dict(loaded["optimizer"])
        run.optimizer.load_parameter_state(str(directory / "mp_rank_00" / "distrib_optim.pt"))
    else:
        shapes = run.model.sharded_state_dict(metadata=METADATA)
        optimizer = run.optimizer.sharded_state_dict(shapes, is_loading=True, metadata=METADATA)
        loaded = dist_checkpointing.load({"model": shapes, "optimizer": optimizer}, str(directory))
        run.optimizer.load_state_dict(loaded["optimizer"])
    run.model.load_state_dict(loaded["model"], strict=True)
    run.step(3)
    return run.weights()


def exchange(_: Axis, room: Path) -> dict[Any, Any]:
    """All that their process does: by what it is, its result, or as text what went wrong."""
    start()
    work: dict[Any, Callable[[], Any]] = {"fp8": partial(train_in_fp8, room / "fp8")}
    work |= {(name, form): partial(compute, room / name, CASES[name], form) for name in CASES for form in FORMS}
    for name in TRAINED:
        runs = room / f"runs of {name}"
        work[name] = partial(train, runs, CASES[name])
        for stored in STORED:
            work |= {(name, stored, form): partial(resume, runs, CASES[name], stored, form) for form in FORMS}
    return {what: attempt(do) for what, do in work.items()}


def attempt(do: Callable[[], Any]) -> Any:
    try:
        return do()
    except (Exception, CheckpointException):  # which is no Exception
        return traceback.format_exc()


@dataclass(frozen=True)
class Gpu:
    """Where all files are, and what their process returned."""

    room: Path
    answers: dict[Any, Any]

    def __getitem__(self, what: Any) -> Any:
        answer = self.answers[what]
        assert not isinstance(answer, str), answer
        return answer


@pytest.fixture(scope="module")
def gpu(tmp_path_factory) -> Gpu:
    room = tmp_path_factory.mktemp("engine")
    for name, case in CASES.items():
        for form in FORMS:
            weights = random_weights(case.config).items()
            save(room / name / f"ours {form}", case.config, weights, target_ckpt_format=form, **get_saver_options(case))
    case = CASES["llama"]
    weights = random_weights(case.config, torch.bfloat16).items()
    save(room / "fp8" / "ours torch", case.config, weights, **get_saver_options(case))
    return Gpu(room, run_ranks(1, exchange, room, timeout_s=280.0)[0])


def rename_to_theirs(case: Case, tensors: Iterable[tuple[str, Tensor]], path: Path) -> dict[str, Tensor]:
    """Canonical tensors as our saver puts them together."""
    save(path, case.config, tensors, **get_saver_options(case))
    return read_model(path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_it_loads_all_of_ours_and_nothing_else_and_computes_the_same(name, form, gpu):
    loader: Any = MegatronCoreLoader(gpu.room / name / f"ours {form}")
    gpt = CASES[name].config.kind == "gpt"
    ours = [our_gpt_logits(loader, TOKENS_BT)] if gpt else our_logits(loader)
    for our, their in zip(ours, gpu[name, form][0], strict=True):
        assert (our - their).abs().max() <= TOLERANCE * our.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_torch_files_hold_the_shapes_and_empty_states_of_its_own(name, gpu):
    assert count_shapes(read_model(gpu.room / name / "ours torch")) == gpu[name, "torch"][2]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_we_load_what_it_saves(name, form, gpu):
    _ = gpu[name, form]
    loader = MegatronCoreLoader(gpu.room / name / f"theirs {form}")
    assert loader.config() == CASES[name].config
    tensors, right = dict(loader.tensors()), random_weights(CASES[name].config)
    assert tensors.keys() == right.keys()
    assert all(torch.equal(tensor, right[one]) for one, tensor in tensors.items())


@pytest.mark.parametrize("name", CASES)
def test_vectors_count_parameters_in_its_order(name, gpu):
    case, layout = CASES[name], get_layout(CASES[name])
    firsts = {second: one for one in gpu[name, "torch"][2] for second in second_names(case.config, one)}
    ours = named_parameters(case.config, layout)[0, 0]
    theirs = [firsts.get(one, one) for one in gpu[name, "torch"][1]]
    assert [written_name(one, layout, experts=case.config.mlp.kind == "moe") for one in ours] == theirs


@pytest.mark.parametrize("form", FORMS)
def test_weights_trained_in_fp8_are_read_without_the_states_beside_them(form, gpu, tmp_path):
    expected, loader = gpu["fp8"], MegatronCoreLoader(gpu.room / "fp8" / f"theirs {form}")
    tensors = rename_to_theirs(CASES["llama"], loader.tensors(), tmp_path / "again")
    start = read_model(gpu.room / "fp8" / "ours torch")
    for name, right in expected.items():
        if name.endswith("_extra_state"):
            assert "decoder.layers" not in name or len(right) > 1000
        else:
            assert right.dtype == torch.bfloat16
            assert torch.equal(tensors[name], right)
            assert not torch.equal(start[name], right)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", TRAINED)
def test_masters_and_moments_are_those_that_it_holds(name, stored, gpu, tmp_path):
    states, _ = gpu[name]
    read = read_torch if stored == "torch" else read_torch_dist
    state = read(gpu.room / f"runs of {name}" / stored / iteration_name(STEP))
    assert (state.iteration, state.optimizer_steps, state.samples) == (STEP, 2, 28)
    for kind, key in zip(KINDS, KEYS, strict=True):
        tensors = rename_to_theirs(CASES[name], state.optimizer[kind](), tmp_path / kind)
        assert all(torch.equal(tensors[one], optimizer_state[key]) for one, optimizer_state in states.items()), kind


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", TRAINED)
def test_it_goes_on_from_ours_as_if_it_had_stayed(name, stored, form, gpu):
    _, right = gpu[name]
    weights = gpu[name, stored, form]
    assert weights.keys() == right.keys()
    assert all(torch.equal(weight, right[one]) for one, weight in weights.items())
