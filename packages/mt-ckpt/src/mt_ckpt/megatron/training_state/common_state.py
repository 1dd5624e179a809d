"""What both of Megatron's formats hold beside tensors."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mt_ckpt.megatron.args.model_types import read_model
from mt_ckpt.megatron.dist_format.reader import DistFiles
from mt_ckpt.megatron.optimizer.param_groups import APART, for_experts, without_params
from mt_ckpt.megatron.torch_format.reader import TorchFiles
from mt_ckpt.megatron.training_state.plain import plain_args
from mt_core.errors import MtError
from mt_models.config import TransformerConfig

RERUN_STATE = "rerun_state_machine"


def read_config(files: TorchFiles | DistFiles, tensor: int | None, true_vocab_size: int | None) -> TransformerConfig:
    """The model; for a target of Megatron's with `tensor` ranks, padding rows count as rows, as they were trained."""
    where, shapes = str(files.path), files.shapes()
    config = read_model(files.args, shapes, where, true_vocab_size)
    if tensor is None:
        return config
    kept = min(files.args.padded_vocab_size, config.vocab_rows(tensor))
    return read_model(files.args, shapes, where, kept)


def common_state(
    where: Path,
    config: TransformerConfig,
    common: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    steps: int | None,
) -> dict[str, Any]:
    """Fields of the training state."""
    args, lost = plain_args(common["args"])
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
