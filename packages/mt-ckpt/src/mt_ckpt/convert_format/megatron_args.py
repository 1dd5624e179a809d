"""The arguments, and the rest that is no tensor, of a checkpoint that is written for Megatron."""

from argparse import Namespace
from typing import Any

import torch

from mt_ckpt.convert_format.state import TrainingState
from mt_ckpt.megatron.arguments import write_args
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.rank_files import VERSION

MODEL_ONLY = ("consumed_train_samples", "seq_length", "vocab_size", "make_vocab_size_divisible_by")
"""What `write_args` fills for a model alone, and the run knows better."""


def args_of(state: TrainingState, layout: Layout, *, dtype: torch.dtype, form: str, distributed: bool) -> Namespace:
    """The run's own arguments, with those that depend on the target's layout."""
    of_model = vars(write_args(state.config, layout, dtype=dtype, form=form))
    own = {name: value for name, value in state.args.items() if value is not None}
    kept = {name: own[name] for name in MODEL_ONLY if name in own}
    found = {**own, **of_model, **kept}
    found |= {
        "consumed_train_samples": state.samples,
        "transformer_impl": "transformer_engine" if layout.engine else "local",
        "use_distributed_optimizer": distributed,
        "overlap_grad_reduce": False,
        "overlap_param_gather": False,
        "data_parallel_size": 1,
        "iteration": state.iteration,
    }
    if state.tokens is not None:
        found["mt_trained_tokens"] = state.tokens
    return Namespace(**found)


def common_of(state: TrainingState, args: Namespace) -> dict[str, Any]:
    """What every rank saves alike, without the optimizer."""
    return {
        "args": args,
        "checkpoint_version": VERSION,
        "iteration": state.iteration,
        "opt_param_scheduler": dict(state.scheduler),
        "num_floating_point_operations_so_far": state.flops,
    }


def groups_with_steps(state: TrainingState) -> list[dict[str, Any]]:
    """Parameter groups as the distributed optimizer saves them; loading one without `step` fails (§2.6)."""
    return [{**group, "step": state.optimizer_steps} for group in state.groups]


def scaler_of(state: TrainingState) -> dict[str, Any]:
    """The loss scale of fp16, or nothing."""
    if not state.grad_scaler:
        return {}
    scale = torch.as_tensor(state.grad_scaler["scale"], dtype=torch.float32).reshape(1)
    return {"grad_scaler": {**state.grad_scaler, "scale": scale}}
