"""Activations that are recomputed in the backward pass instead of saved (arXiv:1604.06174, arXiv:2205.05198).

A model runs its layers through `model.run`, a function of the layers and their input; `recompute` replaces it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mt_core.config.sections import RecomputeConfig
from mt_core.contracts import HasCore, Model

Layer = Callable[[Tensor], Tensor]


def run_sequentially(layers: Sequence[Layer], x: Tensor) -> Tensor:
    """Run one layer after the other; everything that they save for the backward pass is kept."""
    for layer in layers:
        x = layer(x)
    return x


def uniform(layers: Sequence[Layer], x: Tensor, *, size: int) -> Tensor:
    """Run the layers, keeping only the input of every group of `size` layers."""
    for start in range(0, len(layers), size):
        x = run_checkpointed(partial(run_sequentially, layers[start : start + size]), x)
    return x


def block(layers: Sequence[Layer], x: Tensor, *, count: int) -> Tensor:
    """Run the layers, keeping only the input of each of the first `count`, and everything of the others."""
    for layer in layers[:count]:
        x = run_checkpointed(layer, x)
    return run_sequentially(layers[count:], x)


def run_checkpointed(function: Callable[..., Tensor], *inputs: Any, **keywords: Any) -> Tensor:
    """Return the function's value; the backward pass runs it again from its inputs, with the same random numbers."""
    return checkpoint(function, *inputs, use_reentrant=False, **keywords)  # pyright: ignore[reportReturnType]


def recompute(model: Model, config: RecomputeConfig) -> None:
    """Let a model recompute the activations that the configuration names."""
    match config.granularity, config.method:
        case "full", "uniform":
            model.run = partial(uniform, size=config.layers)
        case "full", "block":
            model.run = partial(block, count=config.layers)
        case "selective", _:
            for module in list_modules_with_core(model):
                module.core = partial(run_checkpointed, module.core)


def list_modules_with_core(model: Model) -> list[HasCore]:
    """List the modules of a model that mix positions in a `core`, which can be replaced."""
    modules = (module for module in model.modules() if hasattr(module, "core"))
    return [*modules]  # pyright: ignore[reportReturnType] hasattr is the check
