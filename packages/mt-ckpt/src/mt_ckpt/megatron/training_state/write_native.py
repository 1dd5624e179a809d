"""A native checkpoint of a training state, from which `mt train` goes on."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mt_ckpt.megatron.optimizer import MASTER, MOMENTS
from mt_ckpt.megatron.training_state.run_settings import not_carried_to_mt, to_sections
from mt_ckpt.megatron.training_state.state import TrainingState, stream_checked
from mt_core.checkpoint.native import step_directory
from mt_core.checkpoint.step_writer import write
from mt_core.config.loading import validate
from mt_core.config.sections import (
    BatchConfig,
    LRScheduleConfig,
    OptimConfig,
    PrecisionConfig,
    RuntimeConfig,
    TrainConfig,
)

SETTINGS = "settings.toml"
SECTIONS = {
    "optim": OptimConfig,
    "train": TrainConfig,
    "lr_schedule": LRScheduleConfig,
    "batch": BatchConfig,
    "precision": PrecisionConfig,
    "runtime": RuntimeConfig,
}


def write_native(path: Path, state: TrainingState) -> list[str]:
    """Write a run directory with one step, and the run's settings as far as Megatron tells them; what is lost."""
    sections = to_sections(state.args, state.scheduler)
    lost = list(not_carried_to_mt(state.args, state.scheduler))
    if state.random:
        lost.append("the state of random generators: mt draws from the seed and the step, and starts no other stream")
    tokens = state.tokens
    if tokens is None:
        tokens = state.samples * state.args.get("seq_length", 0)
        lost.append(f"the number of trained tokens, which Megatron does not count: taken as {tokens:,}")
    meta: dict[str, Any] = {
        "step": state.iteration,
        "samples": state.samples,
        "tokens": tokens,
        "loss_scale": _loss_scale(state),
        "config": {"model": state.config.model_dump(mode="json"), **_whole(sections, state.args)},
    }
    parts = {"model": stream_checked(state, "model"), "optim": _optimizer(state, sections["precision"]["dtype"])}
    write(step_directory(path, state.iteration), parts, meta, state.tokenizer_files)
    model = state.config.model_dump(mode="json", exclude_none=True)
    (path / SETTINGS).write_text("\n".join(_toml({"model": model, **sections})), encoding="utf-8")
    return lost


def _whole(sections: Mapping[str, Mapping[str, Any]], args: Mapping[str, Any]) -> dict[str, Any]:
    """Sections as a run of mt's saves them, with defaults where Megatron says nothing."""
    whole = {name: validate(tree, sections.get(name, {})).model_dump(mode="json") for name, tree in SECTIONS.items()}
    lengths = {name: args[name] for name in ("seq_length", "decoder_seq_length") if args.get(name) is not None}
    return {**whole, "data": lengths}


def _optimizer(state: TrainingState, dtype: str) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in stream_checked(state, MASTER):
        if dtype != "fp32":
            yield f"{MASTER}.{name}", tensor
    for kind in MOMENTS:
        for name, tensor in stream_checked(state, kind):
            yield f"{kind}.{name}", tensor
    with torch.device("meta"):
        model = state.config.build()
    count = torch.tensor(float(state.optimizer_steps))
    for parameter, _ in model.named_parameters():
        yield f"step.{next(iter(model.canonical_regions(parameter)))}", count


def _loss_scale(state: TrainingState) -> dict[str, float]:
    scaler = state.grad_scaler
    if not scaler:
        return {"value": 1.0, "good_steps": 0, "overflows_left": 0}
    return {
        "value": float(scaler["scale"]),
        "good_steps": int(scaler["growth_tracker"]),
        "overflows_left": int(scaler["hysteresis_tracker"]),
    }


def _toml(values: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Lines of TOML: plain values, then tables."""
    for name, value in values.items():
        if not isinstance(value, Mapping):
            yield f"{name} = {json.dumps(value)}"
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield f"\n[{path}{name}]"
            yield from _toml(value, f"{path}{name}.")
