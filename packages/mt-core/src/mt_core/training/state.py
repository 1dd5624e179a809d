"""What a checkpoint holds of a run: weights, optimizer state and the position, all under canonical names.

The names are the same under every precision and layout: moments of `layers.0.attn.qkv.weight` are saved as
`exp_avg.layers.0.attn.q.weight` and so on, fp32 masters as `master.…`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mt_core.checkpoint.native import read_meta
from mt_core.checkpoint.parts import empty_tensors, load_part
from mt_core.training.weights import Weights

MASTER = "master"


@dataclass(slots=True)
class Position:
    """How far a run is. `samples` is the data position, valid under any number of ranks."""

    step: int = 0
    samples: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class TrainState:
    """A model, its weights in full precision, and the optimizer that updates them."""

    model: Any
    weights: Weights
    optimizer: torch.optim.Optimizer
    position: Position

    def model_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The model's parameters in canonical form."""
        for name, parameter in self.model.named_parameters():
            yield from self.model.to_canonical(name, parameter.detach())

    def optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Masters (where they are not the model's own) and the optimizer's state in canonical form."""
        for name, master in self.weights.masters.items():
            if master is not self.model.get_parameter(name):
                yield from self._prefixed(MASTER, name, master.detach())
            for key, value in self.optimizer.state[master].items():
                yield from self._prefixed(key, name, value)

    def _prefixed(self, key: str, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        if value.dim() == 0:  # a count of steps: one for each parameter, under the parameter's first canonical name
            yield f"{key}.{self._canonical_names(name)[0]}", value
        else:
            yield from ((f"{key}.{canonical}", t) for canonical, t in self.model.to_canonical(name, value))

    def _canonical_names(self, name: str) -> list[str]:
        meta = torch.empty_like(self.weights.masters[name], device="meta")
        return [canonical for canonical, _ in self.model.to_canonical(name, meta)]

    @torch.no_grad()
    def load(self, step: Path) -> None:
        """Fill weights, optimizer and position from a native checkpoint of the same model."""
        meta = read_meta(step)
        self.load_weights(step)
        self._load_optimizer(step / "optim")
        self.position.step, self.position.samples, self.position.tokens = (
            meta[key] for key in ("step", "samples", "tokens")
        )

    @torch.no_grad()
    def load_weights(self, step: Path) -> None:
        """Fill the weights from the `model` part, which must hold exactly this model's tensors."""
        dtype = next(iter(self.weights.masters.values())).dtype
        found = {n: torch.empty(shape, dtype=dtype) for n, shape in self.model.config.canonical_shapes().items()}
        load_part(step / "model", found)
        for name, master in self.weights.masters.items():
            master.copy_(self.model.from_canonical(name, found.__getitem__))
        self.weights.publish()

    def _load_optimizer(self, directory: Path) -> None:
        saved = empty_tensors(directory)
        load_part(directory, saved)
        keys = sorted({name.split(".", 1)[0] for name in saved})
        for name, master in self.weights.masters.items():
            for key in keys:
                value = self._restore(key, name, saved)
                if key == MASTER:
                    master.copy_(value)
                else:
                    self.optimizer.state[master][key] = value.to(master.device)
        self.weights.publish()

    def _restore(self, key: str, name: str, saved: dict[str, Tensor]) -> Tensor:
        first = saved[f"{key}.{self._canonical_names(name)[0]}"]
        if first.dim() == 0:
            return first
        return self.model.from_canonical(name, lambda canonical: saved[f"{key}.{canonical}"])
