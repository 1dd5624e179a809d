"""The training state of a native checkpoint."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mt_ckpt.megatron.optimizer import KINDS, MASTER
from mt_ckpt.megatron.parameters.table import is_buffer
from mt_ckpt.megatron.training_state.run_settings import (
    build_scheduler,
    default_param_groups,
    not_carried_to_megatron,
    to_args,
)
from mt_ckpt.megatron.training_state.state import Stream, TrainingState, drop_buffers
from mt_ckpt.native.loader import Native
from mt_core.checkpoint import native
from mt_core.checkpoint.shard_files import StoredTensor, open_part
from mt_core.config.sections import LRScheduleConfig
from mt_core.config.trainable import WHERE, is_trainable
from mt_core.errors import MtError, Problem, raise_if
from mt_core.training.lr_schedule import learning_rate
from mt_models.config import TransformerConfig

STEP = "step"
NO_RANDOM_STATE = "the state of random generators: mt draws from the seed and the step, so there is none"


def read_native(path: Path) -> TrainingState:
    """The latest step of a run, or a step directory."""
    loader = Native(path)
    meta = native.read_meta(loader.step)
    values, config = meta["config"], loader.config()
    if not (loader.step / "optim").is_dir():
        raise MtError(str(loader.step), "holds a model alone, no optimizer", "use mt ckpt convert")
    stored = open_part(loader.step / "optim")
    fp32 = values["precision"]["dtype"] == "fp32"
    if values["precision"]["dtype"] == "fp64":
        raise MtError(str(loader.step), "was trained in fp64", "Megatron's optimizers are fp32")
    if not isinstance(config, TransformerConfig):
        raise MtError(str(loader.step), f"holds a {config.kind!r} model", "Megatron's files hold gpt, bert and t5")
    names = [name for name in config.canonical_shapes() if not is_buffer(name)]
    patterns = values["optim"].get("trainable") or getattr(config, "default_trainable", ("*",))
    _refuse_frozen(loader.step, patterns, names)
    raise_if(_problems(loader.step, stored, names, fp32=fp32))
    optimizer: dict[str, Stream] = {kind: partial(_kind, stored, kind, names) for kind in KINDS}
    if fp32:
        optimizer[MASTER] = drop_buffers(loader.tensors)
    args = to_args(values)
    scale = meta["loss_scale"]
    schedule = LRScheduleConfig.model_validate(values["lr_schedule"])
    steps = values["train"]["steps"]
    rate = learning_rate(schedule, values["optim"]["lr"], meta["step"], samples=meta["samples"], steps=steps)
    return TrainingState(
        source=loader.step,
        config=config,
        weights=loader.tensors,
        optimizer=optimizer,
        iteration=meta["step"],
        samples=meta["samples"],
        tokens=meta["tokens"],
        optimizer_steps=_steps(loader.step, stored),
        args=args,
        scheduler=build_scheduler(args, meta["samples"]),
        groups=default_param_groups(args, rate),
        grad_scaler=_grad_scaler(scale) if values["precision"]["dtype"] == "fp16" else None,
        tokenizer_files=loader.tokenizer_files(),
        lost=(NO_RANDOM_STATE, *not_carried_to_megatron(values)),
    )


def _refuse_frozen(step: Path, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a run that froze parameters."""
    if frozen := [name for name in names if not is_trainable(name, patterns)]:
        actual = f"{len(frozen)} of {len(names)} tensors, {frozen[0]} the first, are frozen and have no optimizer state"
        allowed = "training state in Megatron's formats covers every tensor; mt ckpt convert writes the weights alone"
        raise MtError(f"{step}: {WHERE}", actual, allowed)


def _problems(step: Path, stored: dict[str, StoredTensor], names: list[str], *, fp32: bool) -> Iterator[Problem]:
    kinds = [kind for kind in KINDS if kind != MASTER or not fp32]
    expected = {f"{kind}.{name}" for kind in kinds for name in names}
    stored_names = {name for name in stored if not name.startswith(f"{STEP}.")}
    for name in sorted(expected - stored_names):
        yield Problem(f"{step}: {name}", "tensor is missing", "only AdamW's state has a place in Megatron's files")
    for name in sorted(stored_names - expected):
        yield Problem(f"{step}: {name}", "unexpected tensor", "only AdamW's state has a place in Megatron's files")


def _kind(stored: dict[str, StoredTensor], kind: str, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        yield name, stored[f"{kind}.{name}"][...]


def _steps(step: Path, stored: dict[str, StoredTensor]) -> int:
    counts = {int(count[...]) for name, count in stored.items() if name.startswith(f"{STEP}.")}
    if len(counts) != 1:
        problem = f"optimizer steps differ between parameters: {sorted(counts)}"
        raise MtError(str(step), problem, "Megatron counts them once for all")
    return counts.pop()


def _grad_scaler(scale: dict[str, Any]) -> dict[str, Any]:
    return {
        "scale": scale["value"],
        "growth_tracker": scale["good_steps"],
        "hysteresis_tracker": scale["overflows_left"],
    }
