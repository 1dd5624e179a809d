"""megatron-core's own distributed optimizer takes what we write: every moment, master and step, on one and two ranks.

It runs on CPU ranks over gloo. It insists on CUDA in more places than tests/parallel/test_against_megatron_core.py
names: it makes tensors on the device "cuda", moves others there, and looks at the name of a tensor's type.
"""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from ckpt.test_convert_format import state_of_a_run
from ckpt.test_megatron_round_trip import config_of
from mt_ckpt.convert_format.convert import Target, convert_format
from mt_ckpt.convert_format.read_native import read_native
from mt_ckpt.convert_format.state import KINDS
from mt_ckpt.megatron import pickles
from mt_core.parallel.axis import Axis
from mt_core.verification.ranks import run_ranks
from parallel.test_against_megatron_core import fuse, table

pytest.importorskip("megatron.core")

MODEL: dict[str, Any] = {"vocab_size": 64, "layers": 2}
KEYS = ("param", "exp_avg", "exp_avg_sq")
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


def their_optimizer(axis: Axis) -> tuple[Any, Any]:
    """Their bf16 model and its distributed optimizer, after a step."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from parallel.test_against_megatron_core import initialize_megatron, megatron_model

    initialize_megatron(axis)
    torch.cuda.current_device = lambda: torch.device("cpu")  # pyright: ignore[reportAttributeAccessIssue]
    torch.cuda.synchronize = lambda *_: None
    torch.Tensor.cuda = lambda self, *_, **__: self
    named = torch.Tensor.type
    torch.Tensor.type = lambda self, *to: named(self, *to) if to else f"torch.cuda.{named(self).rpartition('.')[2]}"
    model = megatron_model(axis, SimpleNamespace(model=config_of("llama", **MODEL))).bfloat16()
    model.config.bf16 = True
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    values = {"optimizer": "adam", "lr": 1e-3, "bf16": True, "params_dtype": torch.bfloat16, "clip_grad": 0.0}
    config = OptimizerConfig(use_distributed_optimizer=True, **values)
    optimizer = get_megatron_optimizer(config, [DistributedDataParallel(model.config, settings, model)])
    for parameter in model.parameters():
        parameter.main_grad.fill_(0.1)
    optimizer.step()  # torch's Adam has no state before
    return model, optimizer


def load(axis: Axis, room: Path) -> dict[str, Any]:
    """What their optimizer gets from ours, in either format, and the vectors that it would save then."""
    from megatron.core import dist_checkpointing

    with OnCpu():
        model, optimizer = their_optimizer(axis)
        shapes = model.sharded_state_dict(metadata=METADATA)
        asked = {**shapes, "optimizer": optimizer.sharded_state_dict(shapes, is_loading=True, metadata=METADATA)}
        loaded = dist_checkpointing.load(asked, str(room / "torch_dist" / "iter_0000007"))["optimizer"]
        directory = room / f"torch {axis.size}" / "iter_0000007" / f"mp_rank_{axis.rank:02d}"
        optimizer.load_state_dict(pickles.read(directory / "model_optim_rng.pt")["optimizer"])
        groups = optimizer.state_dict()["optimizer"]["param_groups"]
        (one,) = optimizer.chained_optimizers
        for state in one.optimizer.state.values():
            del state["step"]  # of torch's Adam alone; no release reads or writes it, and this one stumbles over it
        optimizer.load_parameter_state(str(directory / "distrib_optim.pt"))
        (vectors,) = one.get_parameter_state_dp_zero(use_gloo_comm=False)[0].values()
    return {
        "names": [name for name, _ in model.named_parameters()],
        "states": [{key: state[key].flatten().tolist() for key in KEYS} for state in loaded["param_state"].values()],
        "vectors": {key: vectors[key].tolist() for key in KEYS},
        "groups": [(group["wd_mult"], int(group["step"])) for group in (*loaded["optimizer"]["param_groups"], *groups)],
    }


@cache
def room() -> Path:
    """Our files of the same run in both formats."""
    path = Path(mkdtemp())
    run = state_of_a_run(path / "run", **MODEL)
    convert_format(run, path / "torch_dist", Target("torch_dist", implementation="local"))
    for size in (1, 2):
        convert_format(run, path / f"torch {size}", Target("torch", tensor=size, implementation="local"))
    return path


@cache
def on_ranks(size: int) -> list[Any]:
    return run_ranks(size, load, room())


def expected(size: int, rank: int) -> dict[str, dict[str, Any]]:
    """Their name of each parameter → what a rank's optimizer should hold of it."""
    state, config = read_native(room() / "run"), config_of("llama", **MODEL)
    kinds = {key: dict(state.optimizer[kind]()) for key, kind in zip(KEYS, KINDS, strict=True)}
    found: dict[str, dict[str, Any]] = {}
    for name in on_ranks(size)[rank]["names"]:
        parts, cut = table(config)[name]
        wholes = {key: fuse(config, [values[part] for part in parts]) for key, values in kinds.items()}
        shares = {key: one if cut is None else one.chunk(size, cut)[rank] for key, one in wholes.items()}
        found[name] = {key: one.flatten().tolist() for key, one in shares.items()}
    return found


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
