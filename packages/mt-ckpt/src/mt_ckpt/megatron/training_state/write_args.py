"""The arguments, and the rest that is no tensor, of a checkpoint that is written for Megatron."""

from argparse import Namespace
from typing import Any

import torch

from mt_ckpt.megatron.args.model_types import model_args
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.optimizer.param_groups import for_experts
from mt_ckpt.megatron.torch_format.writer import VERSION
from mt_ckpt.megatron.training_state.state import TrainingState

MODEL_ONLY = (
    "consumed_train_samples",
    "seq_length",
    "encoder_seq_length",
    "decoder_seq_length",
    "vocab_size",
    "make_vocab_size_divisible_by",
)
"""What `model_args` fills for a model alone, and the run knows better."""


def build_args(state: TrainingState, layout: Layout, *, dtype: torch.dtype, form: str, distributed: bool) -> Namespace:
    """The run's own arguments, with those that depend on the target's layout."""
    of_model = vars(model_args(state.config, layout, dtype=dtype, form=form))
    own = {name: value for name, value in state.args.items() if value is not None}
    kept = {name: own[name] for name in MODEL_ONLY if name in own}
    args = {**own, **of_model, **kept}
    args |= {
        "consumed_train_samples": state.samples,
        "transformer_impl": "transformer_engine" if layout.engine else "local",
        "use_distributed_optimizer": distributed,
        "moe_use_legacy_grouped_gemm": False,
        "overlap_grad_reduce": False,
        "overlap_param_gather": False,
        "data_parallel_size": layout.expert,
        "iteration": state.iteration,
    }
    if state.tokens is not None:
        args["mt_trained_tokens"] = state.tokens
    return Namespace(**args)


def build_common_state(state: TrainingState, args: Namespace) -> dict[str, Any]:
    """What every rank saves alike, without the optimizer."""
    return {
        "args": args,
        "checkpoint_version": VERSION,
        "iteration": state.iteration,
        "opt_param_scheduler": dict(state.scheduler),
        "num_floating_point_operations_so_far": state.flops,
    }


def build_param_groups(state: TrainingState, expert_ranks: int) -> list[list[dict[str, Any]]]:
    """Parameter groups of each optimizer as a distributed one saves them; without `step` loading fails.

    Source: docs/specs/checkpoints.md §2.6.
    """
    groups = [state.groups] if expert_ranks == 1 else [state.groups, for_experts(state.groups)]
    return [[{**group, "step": state.optimizer_steps} for group in own] for own in groups]


def build_grad_scaler(state: TrainingState) -> dict[str, Any]:
    """The loss scale of fp16, or nothing."""
    if not state.grad_scaler:
        return {}
    scale = torch.as_tensor(state.grad_scaler["scale"], dtype=torch.float32).reshape(1)
    return {"grad_scaler": {**state.grad_scaler, "scale": scale}}
