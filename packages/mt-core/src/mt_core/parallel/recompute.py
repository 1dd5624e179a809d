"""Activations that are computed again in the backward pass instead of kept (arXiv:1604.06174, arXiv:2205.05198).

A model runs its layers through `model.run`, a function of the layers and their input; `recompute` replaces it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mt_core.config.sections import RecomputeConfig
from mt_core.contracts import Model

Layer = Callable[[Tensor], Tensor]


def in_order(layers: Sequence[Layer], x: Tensor) -> Tensor:
    """One layer after the other; everything that they save is kept."""
    for layer in layers:
        x = layer(x)
    return x


def uniform(layers: Sequence[Layer], x: Tensor, *, size: int) -> Tensor:
    """Only the input of every group of `size` layers is kept."""
    for start in range(0, len(layers), size):
        x = again(partial(in_order, layers[start : start + size]), x)
    return x


def block(layers: Sequence[Layer], x: Tensor, *, count: int) -> Tensor:
    """Of the first `count` layers only the input is kept, of the others everything."""
    for layer in layers[:count]:
        x = again(layer, x)
    return in_order(layers[count:], x)


def again(function: Callable[..., Tensor], *inputs: Any, **more: Any) -> Tensor:
    """The function's value; in the backward pass it is run again from its inputs, with the same random numbers."""
    return checkpoint(function, *inputs, use_reentrant=False, **more)  # pyright: ignore[reportReturnType]


def recompute(model: Model, config: RecomputeConfig) -> None:
    """Make a model forget what the configuration says."""
    match config.granularity, config.method:
        case "full", "uniform":
            model.run = partial(uniform, size=config.layers)
        case "full", "block":
            model.run = partial(block, count=config.layers)
        case "selective", _:
            for attention in modules_with_core(model):
                attention.core = partial(again, attention.core)


def modules_with_core(model: Model) -> list[Any]:
    """The modules of a model whose `core`, an `AttentionCore`, mixes positions."""
    return [module for module in model.modules() if hasattr(module, "core")]
