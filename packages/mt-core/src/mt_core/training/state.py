"""What a checkpoint holds of a run: weights, optimizer state and the position, all under canonical names.

Names and shapes are the same under every precision and layout: moments of `layers.0.attn.qkv.weight` are saved as
`exp_avg.layers.0.attn.q.weight` and so on, whole; fp32 masters of a 16-bit model as `master.…`. When saving, whole
tensors are gathered to the ranks that write them; when loading, each rank reads the parts that it holds.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mt_core.checkpoint.gather import choose_owners, gather_whole
from mt_core.checkpoint.native import read_meta, reading
from mt_core.checkpoint.shard_files import StoredTensor, check_names, open_part
from mt_core.parallel.data.protocol import DataParallel
from mt_core.training.loss_scale import LossScale

MASTER = "master"


@dataclass(slots=True)
class Position:
    """How far a run is. `samples` is the data position, valid under any number of ranks."""

    step: int = 0
    samples: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class TrainState:
    """A model, its weights in full precision and the optimizer that updates them, as this rank holds them."""

    model: Any
    engine: DataParallel
    optimizer: torch.optim.Optimizer
    position: Position = field(default_factory=Position)
    loss_scale: LossScale = field(default_factory=LossScale)

    def initialize(self, seed: int) -> None:
        """Draw the weights, several tensors at a time: the same under every layout."""
        threads, names = torch.get_num_threads(), list(self.engine.masters)
        with ThreadPoolExecutor(threads) as pool, torch.no_grad():
            for first in range(0, len(names), threads):
                few = names[first : first + threads]
                parts = pool.map(lambda name: self._part(name, partial(self.model.initial, seed)), few)
                for name, part in zip(few, parts, strict=True):
                    self.engine.masters[name].copy_(part)
        self.engine.publish()

    @torch.no_grad()
    def fill(self, get: Callable[[str], Any]) -> None:
        """Set the weights from whole canonical tensors, or stored ones, of which each rank takes its parts."""
        self.engine.wait()  # masters may be read by a gathering that is under way
        for name, master in self.engine.masters.items():
            master.copy_(self._part(name, get))
        self.engine.publish()

    def _part(self, name: str, get: Callable[[str], Any]) -> Tensor:
        axis = self.engine.placements[name].axis
        local = self.model.from_canonical(name, get, axis.rank, axis.size)
        assert local.shape == self.engine.shapes[name], f"{name}: {local.shape} is not {self.engine.shapes[name]}"
        shard, _ = self.engine.mesh.sharing(axis)
        return self.engine.view(name, local, shard.rank)

    def parts(self) -> dict[str, Iterator[tuple[str, Tensor]]]:
        """The tensors of a checkpoint that this rank writes. All ranks must iterate over all parts, in this order."""
        self.engine.wait()
        return {"model": self._model_tensors(), "optim": self._optimizer_tensors()}

    def owned_bytes(self) -> int:
        """About how much this rank writes: its share of the weights, of masters if they differ, and of two moments."""
        wide = torch.promote_types(self.engine.dtype, torch.float32).itemsize
        masters = wide if wide != self.engine.dtype.itemsize else 0
        mine = [name for name, owner in self._owners().items() if owner == self.engine.mesh.world.rank]
        elements = sum(self.engine.shapes[name].numel() * self.engine.placements[name].axis.size for name in mine)
        return elements * (self.engine.dtype.itemsize + masters + 2 * wide)

    def meta(self) -> dict[str, Any]:
        """The rest of a checkpoint, as plain values."""
        return {**asdict(self.position), "loss_scale": asdict(self.loss_scale)}

    def _model_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, owner in self._owners().items():
            master = self.engine.masters.get(name)
            part = None if master is None else master.detach().to(self.engine.dtype)
            yield from self._whole(name, part, owner)

    def _optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        counts, keys = self._state_keys()
        wide = torch.promote_types(self.engine.dtype, torch.float32)
        for name, owner in self._owners().items():
            master = self.engine.masters.get(name)
            values: Mapping[str, Any] = {} if master is None else self.optimizer.state[master]
            if self.engine.dtype != wide:
                whole = self._whole(name, None if master is None else master.detach(), owner)
                yield from ((f"{MASTER}.{canonical}", tensor) for canonical, tensor in whole)
            for key in keys:
                yield from ((f"{key}.{canonical}", t) for canonical, t in self._whole(name, values.get(key), owner))
            if owner == self.engine.mesh.world.rank:
                yield from ((f"{key}.{self._canonical_names(name)[0]}", value) for key, value in counts.items())

    def _state_keys(self) -> tuple[dict[str, Tensor], list[str]]:
        """Counts, which are the same for all parameters, and the names of what is shaped like a parameter."""
        state = next((self.optimizer.state[m] for m in self.engine.masters.values() if self.optimizer.state[m]), {})
        counts = {key: value for key, value in state.items() if value.dim() == 0}
        return counts, sorted(state.keys() - counts.keys())

    def _whole(self, name: str, part: Tensor | None, owner: int) -> Iterator[tuple[str, Tensor]]:
        return gather_whole(self.model, self.engine, name, part, owner)

    def _owners(self) -> dict[str, int]:
        """Parameter → the rank that writes it, in the model's order."""
        sizes = {name: shape.numel() for name, shape in self.engine.shapes.items()}
        owners = choose_owners(sizes, lambda _: range(self.engine.mesh.world.size))
        return {name: owners[name] for name in sizes}

    def _canonical_names(self, name: str) -> list[str]:
        return list(self.model.canonical_regions(name))

    def load(self, step: Path) -> None:
        """Fill weights, optimizer and position from a native checkpoint of the same model, whatever its layout was."""
        with reading(step):
            meta = read_meta(step)
            self.load_weights(step)
            self._load_optimizer(step / "optim")
        for key in asdict(self.position):
            setattr(self.position, key, meta[key])
        for key, value in meta.get("loss_scale", {}).items():
            setattr(self.loss_scale, key, value)

    def load_weights(self, step: Path) -> None:
        """Fill the weights from the `model` part, which must hold exactly this model's tensors."""
        self.fill(check_names(step / "model", self.model.config.canonical_shapes()).__getitem__)

    @torch.no_grad()
    def _load_optimizer(self, directory: Path) -> None:
        self.engine.wait()
        saved = open_part(directory)
        keys = sorted({name.split(".", 1)[0] for name in saved})
        for name, master in self.engine.masters.items():
            for key in keys:
                value = self._restore(key, name, saved)
                if key == MASTER:
                    master.copy_(value)
                else:
                    self.optimizer.state[master][key] = value.to(master.device, copy=True)
        self.engine.publish()

    def _restore(self, key: str, name: str, saved: Mapping[str, StoredTensor]) -> Tensor:
        first = saved[f"{key}.{self._canonical_names(name)[0]}"]
        if not first.shape:
            return first[...]
        return self._part(name, lambda canonical: saved[f"{key}.{canonical}"])
