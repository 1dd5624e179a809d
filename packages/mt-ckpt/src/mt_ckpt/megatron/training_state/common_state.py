"""What both of Megatron's formats hold beside tensors, with arguments as plain values.

Megatron's weights-only reader takes plain values back (docs/specs/checkpoints.md §1.5).
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from signal import Signals
from types import SimpleNamespace
from typing import Any

import torch

from mt_ckpt.megatron.args.model_types import read_model
from mt_ckpt.megatron.dist_format.reader import DistFiles
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.optimizer.param_groups import APART, for_experts, without_params
from mt_ckpt.megatron.torch_format.reader import TorchFiles
from mt_core.errors import MtError
from mt_models.config import TransformerConfig

RERUN_STATE = "rerun_state_machine"
SCALARS = (type(None), bool, int, float, str, bytes, torch.dtype, Signals)


def read_config(files: TorchFiles | DistFiles, tensor: int | None, true_vocab_size: int | None) -> TransformerConfig:
    """The model; for a target of Megatron's with `tensor` ranks, padding rows count as rows, as they were trained."""
    where, shapes = str(files.path), files.shapes()
    config = read_model(files.args, shapes, where, true_vocab_size)
    if tensor is None:
        return config
    kept = min(files.args.padded_vocab_size, config.vocab_rows(tensor))
    return read_model(files.args, shapes, where, kept)


def layout_from_args(args: Mapping[str, Any]) -> Layout:
    """How the run of these arguments was cut, and whose layers it had."""
    engine = args.get("transformer_impl", "transformer_engine") != "local"
    return Layout(
        args.get("tensor_model_parallel_size") or 1,
        args.get("pipeline_model_parallel_size") or 1,
        args.get("virtual_pipeline_model_parallel_size") or 1,
        engine=engine,
        expert=args.get("expert_model_parallel_size") or 1,
        grouped=engine and bool(args.get("num_experts") and args.get("moe_grouped_gemm")),
    )


def common_state(
    where: Path,
    config: TransformerConfig,
    common: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    steps: int | None,
) -> dict[str, Any]:
    """Fields of the training state."""
    args, lost = to_plain_args(common["args"])
    if steps is None:
        steps = common.get("iteration", 0)
    if "opt_param_scheduler" not in common and "lr_scheduler" not in common:
        raise MtError(str(where), "holds no state of the learning rate", "use mt ckpt convert for the weights")
    scaler = _grad_scaler(common.get("optimizer"))
    not_carried = [f"args.{name}, of a class of Megatron's own" for name in lost]
    if common.get(RERUN_STATE):
        not_carried.append("the state of the machinery that repeats failed steps (rerun_state_machine)")
    shared = [without_params(group) for group in groups if not group.get(APART)]
    if any(without_params(group) not in for_experts(shared) for group in groups if group.get(APART)):
        not_carried.append("settings of the experts' parameter group, which differ from those of the others")
    return {
        "source": where,
        "config": config,
        "iteration": common.get("iteration", common.get("total_iters", 0)),
        "samples": args.get("consumed_train_samples", 0),
        "tokens": args.get("mt_trained_tokens"),
        "optimizer_steps": steps,
        "args": args,
        "scheduler": dict(common.get("opt_param_scheduler") or common["lr_scheduler"]),
        "groups": shared,
        "grad_scaler": scaler,
        "flops": common.get("num_floating_point_operations_so_far", 0),
        "lost": not_carried,
    }


def list_optimizers(optimizer: Any) -> list[Any]:
    """What Megatron saved of each of its optimizers; several are a list or, in `torch_dist`, a dict by number."""
    if isinstance(optimizer, Mapping) and 0 in optimizer:
        return [optimizer[number] for number in sorted(optimizer)]
    return [*optimizer] if isinstance(optimizer, list | tuple) else [optimizer]


def _grad_scaler(optimizer: Any) -> Mapping[str, Any] | None:
    first = list_optimizers(optimizer)[0]
    return first.get("grad_scaler") if isinstance(first, Mapping) else None


def to_plain_args(args: Any) -> tuple[dict[str, Any], list[str]]:
    """The arguments whose values are plain, paths as text, and the names of the others."""
    values = {name: _plain(value) for name, value in vars(args).items()}
    lost = sorted(name for name, value in values.items() if value is _LOST)
    return {name: value for name, value in values.items() if value is not _LOST}, lost


class _Lost:
    """Marks a value of a class of Megatron's own."""


_LOST = _Lost()


def _plain(value: Any) -> Any:
    if isinstance(value, PurePath):
        return str(value)
    if type(value) in SCALARS or isinstance(value, Signals):
        return value
    if type(value) in (list, tuple, set):
        parts = [_plain(part) for part in value]
        return _LOST if _LOST in parts else type(value)(parts)
    if isinstance(value, Mapping):
        items = {key: _plain(part) for key, part in value.items()}
        return _LOST if _LOST in items.values() else items
    if type(value) in (Namespace, SimpleNamespace):
        parts = _plain(vars(value))
        return _LOST if parts is _LOST else type(value)(**parts)
    return _LOST
