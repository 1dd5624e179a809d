"""Training states under a layout, built as `mt train` builds them, for tests that look inside a step."""

from collections.abc import Sequence
from typing import Any

import torch

from mt_cli.train.compose import build_state
from mt_core.distributed.mesh import Mesh, make_mesh
from mt_core.distributed.topology import resolve_dims
from mt_core.training.batch_inputs import Batch
from mt_core.training.state import TrainState
from mt_core.training.step import Update, backward, reduce, update
from mt_core.verification.measure import random_batches

CPU = torch.device("cpu")


def state_of(config: Any, ranks: int = 1) -> TrainState:
    """The initialised state of this rank, one of `ranks` joined ones."""
    return build_state(config, make_mesh(resolve_dims(config.parallel, ranks)), CPU, resume=False)


def batches_of(config: Any, mesh: Mesh, step: int = 0) -> list[Batch]:
    """This rank's micro-batches of a step: the same samples whatever the layout."""
    return list(random_batches(config, mesh, step, documents=False))


def gradients(config: Any, state: TrainState, batches: Sequence[Batch]) -> torch.Tensor:
    """Compute the gradients of a step in which every token counts; returns this rank's share of the loss."""
    tokens = config.batch.global_batch * config.data.seq_length
    keywords = {"scale": state.loss_scale.value, "pipeline": state.pipeline}
    loss = backward(state.model, state.data_parallel, batches, tokens, CPU, **keywords).loss
    reduce(state.data_parallel)
    return loss


def step(config: Any, state: TrainState, number: int = 0) -> Update:
    """One whole step on random tokens."""
    gradients(config, state, batches_of(config, state.data_parallel.mesh, number))
    scale, clip = state.loss_scale.value, config.optim.clip_norm
    found = update(state.data_parallel, state.optimizer, lr=config.optim.lr, clip_norm=clip, scale=scale)
    state.data_parallel.wait()
    return found
