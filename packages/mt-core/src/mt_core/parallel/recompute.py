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
    """Run one layer after the other; everything that they save is kept."""
    for layer in layers:
        x = layer(x)
    return x


def uniform(layers: Sequence[Layer], x: Tensor, *, size: int) -> Tensor:
    """Run the layers, of which only the input of every group of `size` is kept."""
    for start in range(0, len(layers), size):
        x = run_checkpointed(partial(run_sequentially, layers[start : start + size]), x)
    return x


def block(layers: Sequence[Layer], x: Tensor, *, count: int) -> Tensor:
    """Run the layers, keeping only the inputs of the first `count`, and everything of the others."""
    for layer in layers[:count]:
        x = run_checkpointed(layer, x)
    return run_sequentially(layers[count:], x)


def run_checkpointed(function: Callable[..., Tensor], *inputs: Any, **more: Any) -> Tensor:
    """The function's value; in the backward pass it is run again from its inputs, with the same random numbers."""
    return checkpoint(function, *inputs, use_reentrant=False, **more)  # pyright: ignore[reportReturnType]


def recompute(model: Model, config: RecomputeConfig) -> None:
    """Make a model recompute what the configuration says."""
    match config.granularity, config.method:
        case "full", "uniform":
            model.run = partial(uniform, size=config.layers)
        case "full", "block":
            model.run = partial(block, count=config.layers)
        case "selective", _:
            for module in modules_with_core(model):
                module.core = partial(run_checkpointed, module.core)


def modules_with_core(model: Model) -> list[HasCore]:
    """The modules of a model that mix positions in a `core`, which can be replaced."""
    modules = (module for module in model.modules() if hasattr(module, "core"))
    return [*modules]  # pyright: ignore[reportReturnType] hasattr is the check
