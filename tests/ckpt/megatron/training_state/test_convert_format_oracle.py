"""megatron-core's own optimizers take what we write: every moment, master and step, on one and two ranks.

It takes vectors, which know no names, and saves tensors by name, and the reverse: if what we read then is what we had,
our order of parameters is its own. With two ranks BERT and T5 are cut.

It runs on CPU ranks over gloo. It insists on CUDA in more places than tests/parallel/test_against_megatron_core.py
names: it makes tensors on the device "cuda", moves others there, and looks at the name of a tensor's type.
"""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from ckpt.megatron.core_models import with_experts, without_cuda
from ckpt.megatron.test_encoders import MODELS as ENCODERS
from ckpt.megatron.test_encoders_oracle import their_bert, their_t5
from ckpt.megatron.test_round_trip import build_config
from ckpt.megatron.training_state.test_convert_format import LATENT, write_run
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.optimizer import KINDS
from mt_ckpt.megatron.placement import named_parameters, place_parameters
from mt_ckpt.megatron.torch_format import safe_unpickle
from mt_ckpt.megatron.training_state.convert import Target, convert_format
from mt_ckpt.megatron.training_state.read_native import read_native
from mt_ckpt.megatron.training_state.read_torch import read_torch
from mt_ckpt.megatron.training_state.read_torch_dist import read_torch_dist
from mt_core.distributed.mesh import Axis
from mt_core.verification.ranks import run_ranks
from parallel.test_against_megatron_core import fuse, table

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("megatron_core")]

MODEL: dict[str, Any] = {"vocab_size": 64, "layers": 2}
KEYS = ("param", "exp_avg", "exp_avg_sq")
ITERATION = "iter_0000007"
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


class OnCpu(TorchFunctionMode):
    """Calls that ask for CUDA get the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def on_cpu() -> None:
    """What the optimizer needs besides `OnCpu`."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # pyright: ignore[reportAttributeAccessIssue]
    torch.cuda.synchronize = lambda *_: None
    torch.Tensor.cuda = lambda self, *_, **__: self
    named = torch.Tensor.type
    torch.Tensor.type = lambda self, *to: named(self, *to) if to else f"torch.cuda.{named(self).rpartition('.')[2]}"


def without_steps() -> None:
    """Taking a parameter's state by name, the optimizer stumbles over the step that torch's Adam keeps there."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    take = DistributedOptimizer._set_main_param_and_optimizer_states
    given = lambda self, parameter, tensors: take(self, parameter, {**tensors, "step": torch.tensor(7.0)})  # noqa: E731
    DistributedOptimizer._set_main_param_and_optimizer_states = given


def build_optimizer(model: Any, *, distributed: bool = True) -> Any:
    """Their optimizer of their model, which becomes bf16, after a step."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    model.bfloat16().config.bf16 = True
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed)
    values = {"optimizer": "adam", "lr": 1e-3, "bf16": True, "params_dtype": torch.bfloat16, "clip_grad": 0.0}
    config = OptimizerConfig(use_distributed_optimizer=distributed, **values)
    optimizer = get_megatron_optimizer(config, [DistributedDataParallel(model.config, settings, model)])
    for parameter in model.parameters():
        parameter.main_grad.fill_(0.1)
    optimizer.step()  # torch's Adam has no state before
    return optimizer


def take_vectors(optimizer: Any, file: Path) -> None:
    """Load them without the steps of torch's Adam, which no release reads or writes, and this one stumbles over."""
    states = [state for one in optimizer.chained_optimizers for state in one.optimizer.state.values()]
    steps = [state.pop("step") for state in states]
    optimizer.load_parameter_state(str(file))
    for state, step in zip(states, steps, strict=True):
        state["step"] = step


def answer(axis: Axis, room: Path) -> dict[str, Any]:
    answers = load(axis, room)
    with OnCpu():
        return answers | {"orders": {case: exchange(axis, case, room / f"{case} {axis.size}") for case in CASES}}


def load(axis: Axis, room: Path) -> dict[str, Any]:
    """What their optimizer gets from ours, in either format, and the vectors that it would save then."""
    from megatron.core import dist_checkpointing

    from parallel.test_against_megatron_core import initialize_megatron, megatron_model

    initialize_megatron(axis)
    without_cuda()
    on_cpu()
    without_steps()
    with OnCpu():
        model = megatron_model(axis, SimpleNamespace(model=build_config("llama", **MODEL)))
        optimizer = build_optimizer(model)
        shapes = model.sharded_state_dict(metadata=METADATA)
        asked = {**shapes, "optimizer": optimizer.sharded_state_dict(shapes, is_loading=True, metadata=METADATA)}
        loaded = dist_checkpointing.load(asked, str(room / "torch_dist" / "iter_0000007"))["optimizer"]
        directory = room / f"torch {axis.size}" / "iter_0000007" / f"mp_rank_{axis.rank:02d}"
        optimizer.load_state_dict(safe_unpickle.read(directory / "model_optim_rng.pt")["optimizer"])
        groups = optimizer.state_dict()["optimizer"]["param_groups"]
        take_vectors(optimizer, directory / "distrib_optim.pt")
        (one,) = optimizer.chained_optimizers
        (vectors,) = one.get_parameter_state_dp_zero(use_gloo_comm=False)[0].values()
    return {
        "names": [name for name, _ in model.named_parameters()],
        "states": [{key: state[key].flatten().tolist() for key in KEYS} for state in loaded["param_state"].values()],
        "vectors": {key: vectors[key].tolist() for key in KEYS},
        "groups": [(group["wd_mult"], int(group["step"])) for group in (*loaded["optimizer"]["param_groups"], *groups)],
    }


EXPERTS: dict[str, Any] = {
    "attention": {"heads": 4, "num_kv_heads": 2, "head_size": 6, "qk_norm": True},
    "mlp": {"kind": "moe", "ffn_hidden_size": 8, "experts": 4, "top_k": 2, "normalized": True, "aux_loss_coeff": 0.0},
}
CASES: dict[str, Any] = {
    "bert": ENCODERS["bert"].model_copy(update={"layers": 2, "vocab_size": 64}),
    "t5": ENCODERS["bare t5"].model_copy(update={"layers": 1, "decoder_layers": 2, "vocab_size": 64}),
    "relative t5": ENCODERS["relative t5"].model_copy(update={"layers": 1, "decoder_layers": 1, "vocab_size": 64}),
    "experts": build_config("llama", **MODEL, **EXPERTS),
    "latent experts": build_config("llama", **MODEL, **LATENT),
}
MOVED = {1: ("experts", "latent experts"), 2: ("bert", "t5")}
"""What is moved on so many ranks."""
FORMS = {
    "torch": Target("torch", implementation="local"),
    "torch, plain": Target("torch", implementation="local", optimizer="plain"),
    "torch_dist": Target("torch_dist", implementation="local"),
    "torch_dist, plain": Target("torch_dist", implementation="local", optimizer="plain"),
}


def get_sizes(case: str, ranks: int) -> dict[str, int]:
    return {"expert": ranks} if "experts" in case else {"tensor": ranks}


def their_model(axis: Axis, case: str) -> Any:
    """Their model of a case, on all ranks."""
    from megatron.core import parallel_state

    config, sizes = CASES[case], get_sizes(case, axis.size)
    parallel_state.destroy_model_parallel()
    given = {f"{name}_model_parallel_size": size for name, size in sizes.items()}
    parallel_state.initialize_model_parallel(**given)
    if config.kind != "gpt":
        return {"bert": their_bert, "t5": their_t5}[config.kind](axis, config)
    from megatron.core import transformer

    with pytest.MonkeyPatch.context() as patch:
        for name in ("TransformerConfig", "MLATransformerConfig"):
            patch.setattr(transformer, name, partial(getattr(transformer, name), expert_model_parallel_size=axis.size))
        return with_experts(SimpleNamespace(size=1), config)


def exchange(axis: Axis, case: str, room: Path) -> list[str]:
    """Take ours in one form and save it in the other; the names of their parameters."""
    model = their_model(axis, case)
    names = [name for name, _ in model.named_parameters()]
    if case in MOVED[axis.size]:
        move(axis, model, build_optimizer(model), room, "")
        model = their_model(axis, case)
        move(axis, model, build_optimizer(model, distributed=False), room, ", plain")
    return names


def move(axis: Axis, model: Any, optimizer: Any, room: Path, how: str) -> None:
    """From each of our forms to the other, as Megatron's training loads and saves."""
    from megatron.core import dist_checkpointing

    metadata = {**METADATA, "chained_optim_avoid_prefix": not how}
    ours = {form: room / f"{form}{how}" / ITERATION for form in ("torch", "torch_dist")}
    (own,) = [
        path
        for path in ours["torch"].iterdir()
        if path.name in (f"mp_rank_{axis.rank:02d}", f"mp_rank_00_{axis.rank:03d}")
    ]
    state = safe_unpickle.read(own / "model_optim_rng.pt")
    common = {name: state[name] for name in ("args", "iteration", "checkpoint_version", "opt_param_scheduler")}

    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if not how:
        take_vectors(optimizer, own / "distrib_optim.pt")
    save_dist(model, optimizer, room / f"theirs, torch_dist{how}", common, metadata)
    if not how:
        kind = {**metadata, "distrib_optim_sharding_type": "dp_reshardable"}
        save_dist(model, optimizer, room / "theirs, buckets", common, kind)

    shapes = model.sharded_state_dict(metadata=metadata)
    asked = {**shapes, "optimizer": optimizer.sharded_state_dict(shapes, is_loading=True, metadata=metadata)}
    loaded = dist_checkpointing.load(asked, str(ours["torch_dist"]))
    model.load_state_dict({name: value for name, value in loaded.items() if name in model.state_dict()})
    optimizer.load_state_dict(loaded["optimizer"])
    folder = room / f"theirs, torch{how}" / ITERATION / own.name
    folder.mkdir(parents=True)
    saved = {**common, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, folder / "model_optim_rng.pt")
    if not how:
        optimizer.save_parameter_state(str(folder / "distrib_optim.pt"))


def save_dist(model: Any, optimizer: Any, room: Path, common: dict[str, Any], metadata: dict[str, Any]) -> None:
    from megatron.core import dist_checkpointing

    shapes = model.sharded_state_dict(metadata=metadata)
    state = {**shapes, **common, "optimizer": optimizer.sharded_state_dict(shapes, metadata=metadata)}
    (room / ITERATION).mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(state, str(room / ITERATION))


def moved() -> list[tuple[str, int, str]]:
    forms = (*(f"theirs, {form}" for form in FORMS), "theirs, buckets")
    return [(case, ranks, form) for ranks, cases in MOVED.items() for case in cases for form in forms]


@cache
def room() -> Path:
    """Our files of the same run in both formats."""
    path = Path(mkdtemp())
    run = write_run(path / "run", build_config("llama", **MODEL))
    convert_format(run, path / "torch_dist", Target("torch_dist", implementation="local"))
    for size in (1, 2):
        convert_format(run, path / f"torch {size}", Target("torch", tensor=size, implementation="local"))
        for case in MOVED[size]:
            run_of_case = write_run(path / f"{case} {size}" / "run", CASES[case])
            for form, target in FORMS.items():
                cut = replace(target, **get_sizes(case, size))
                convert_format(run_of_case, path / f"{case} {size}" / form, cut)
    return path


@cache
def on_ranks(size: int) -> list[Any]:
    return run_ranks(size, answer, room())


def expected(size: int, rank: int) -> dict[str, dict[str, Any]]:
    """Their name of each parameter → what a rank's optimizer should hold of it."""
    state, config = read_native(room() / "run"), build_config("llama", **MODEL)
    kinds = {key: dict(state.optimizer[kind]()) for key, kind in zip(KEYS, KINDS, strict=True)}
    tensors: dict[str, dict[str, Any]] = {}
    for name in on_ranks(size)[rank]["names"]:
        parts, cut = table(config)[name]
        wholes = {key: fuse(config, [values[part] for part in parts]) for key, values in kinds.items()}
        shares = {key: one if cut is None else one.chunk(size, cut)[rank] for key, one in wholes.items()}
        tensors[name] = {key: one.flatten().tolist() for key, one in shares.items()}
    return tensors


@pytest.mark.parametrize("size", [1, 2])
def test_it_takes_every_state_from_torch_dist(size):
    for rank, answer in enumerate(on_ranks(size)):
        taken = {tuple(state["param"]): state for state in answer["states"]}
        for name, state in expected(size, rank).items():
            assert taken[tuple(state["param"])] == state, name


@pytest.mark.parametrize("size", [1, 2])
def test_it_takes_every_vector_from_torch_files(size):
    for rank, answer in enumerate(on_ranks(size)):
        for key in KEYS:
            theirs, start = answer["vectors"][key], 0
            for name, state in reversed(expected(size, rank).items()):
                start = -(-start // 64) * 64
                assert theirs[start : start + len(state[key])] == state[key], (name, key)
                start += len(state[key])


@pytest.mark.parametrize("size", [1, 2])
def test_it_goes_on_at_our_step(size):
    assert [answer["groups"] for answer in on_ranks(size)] == [[(1.0, 7), (0.0, 7)] * 2] * size


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 2])
def test_its_parameters_have_our_order(case, size):
    layout = Layout(engine=False, pipeline=1, virtual=1, **{"tensor": 1, "expert": 1} | get_sizes(case, size))
    ours = [name for name in named_parameters(place_parameters(CASES[case], layout))[0, 0]]
    for answer in on_ranks(size):
        assert [name.removeprefix("lm_head.") if name.startswith("lm_head.output") else name
                for name in answer["orders"][case]] == ours  # fmt: skip


@pytest.mark.parametrize(("case", "ranks", "form"), moved())
def test_what_it_took_and_saved_in_another_form_is_what_we_had(case, ranks, form):
    on_ranks(ranks)
    read = read_torch if form.startswith("theirs, torch") and "dist" not in form else read_torch_dist
    place = room() / f"{case} {ranks}"
    state, source = read(place / form / ITERATION), read_native(place / "run")
    assert state.config == CASES[case]
    assert (state.iteration, state.optimizer_steps) == (7, 7)
    for kind in ("model", *KINDS):
        ours, theirs = (dict({"model": one.weights, **one.optimizer}[kind]()) for one in (source, state))
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == [], kind
