"""The part of a run that a checkpoint stores: weights, optimizer state and the position, under canonical names.

Names and shapes are the same under every precision and layout: moments of `layers.0.attn.qkv.weight` are saved as
`exp_avg.layers.0.attn.q.weight` and so on, whole; fp32 main parameters of a 16-bit model as `master.…`. When saving,
whole tensors are gathered to the ranks that write them; when loading, each rank reads the parts that it needs.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mt_core.checkpoint.gather import assign_writers, gather_whole
from mt_core.checkpoint.native import locked_for_reading, read_meta
from mt_core.checkpoint.shard_files import StoredTensor, check_names, open_part
from mt_core.config.sections import PrecisionConfig
from mt_core.config.trainable import WHERE
from mt_core.errors import MtError, Problem, raise_if
from mt_core.parallel.data.protocol import DataParallel
from mt_core.parallel.pipeline.cut import Pipeline
from mt_core.training.loss_scale import LossScale

MASTER = "master"
"""Key of main parameters in checkpoints."""


@dataclass(slots=True)
class Position:
    """Progress of a run. `samples` is the data position, valid under any number of ranks."""

    step: int = 0
    samples: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class TrainState:
    """A model, its weights in full precision and the optimizer that updates them, as this rank holds them."""

    model: Any
    data_parallel: DataParallel
    optimizer: torch.optim.Optimizer
    position: Position = field(default_factory=Position)
    loss_scale: LossScale = field(default_factory=LossScale)
    pipeline: Pipeline | None = None
    """The stages, if the model is cut into some; this rank then has a part of the parameters."""

    def initialize(self, seed: int) -> None:
        """Draw the weights, several tensors at a time: they are the same under every layout."""
        local = self._local_shards()
        threads, names = torch.get_num_threads(), list(local)
        with ThreadPoolExecutor(threads) as pool, torch.no_grad():
            for first in range(0, len(names), threads):
                few = names[first : first + threads]
                parts = pool.map(lambda name: self._part(name, partial(self.model.initial, seed)), few)
                for name, part in zip(few, parts, strict=True):
                    local[name].copy_(part)
        self.data_parallel.all_gather_params()

    @contextmanager
    def filling(self) -> Iterator[Callable[[str, Callable[[str], Any]], None]]:
        """Yield `fill(name, get)`, which sets this rank's shard of a parameter from the canonical tensors that `get`
        returns, whole or stored; after the block, ranks gather the weights."""
        self.data_parallel.wait()  # main parameters may be read by an all-gather that is under way
        local, buffers = self._local_shards(), self.stored_buffers()

        def fill(name: str, get: Callable[[str], Any]) -> None:
            if name in local:
                local[name].copy_(self._part(name, get))
            elif name in buffers:
                buffers[name].copy_(self.model.from_canonical(name, get))

        with torch.no_grad():
            yield fill
        self.data_parallel.all_gather_params()

    def fill(self, get: Callable[[str], Any]) -> None:
        """Set the weights from the canonical tensors that `get` returns, whole or stored."""
        with self.filling() as fill:
            for name in (*self.data_parallel.shapes, *self.stored_buffers()):
                fill(name, get)

    def stored_buffers(self) -> dict[str, Tensor]:
        """Return the buffers that checkpoints have, such as the biases of routers; every rank has them whole."""
        shapes = self.model.config.canonical_shapes()
        return {name: buffer for name, buffer in self.model.named_buffers() if name in shapes}

    def _local_shards(self) -> dict[str, Tensor]:
        """Return this rank's shard of every parameter, in the model's order: main parameters, and frozen ones."""
        local: Mapping[str, Tensor] = {**self.data_parallel.main_params, **self.data_parallel.frozen}
        return {name: local[name] for name in self.data_parallel.shapes if name in local}

    def _part(self, name: str, get: Callable[[str], Any]) -> Tensor:
        placement = self.data_parallel.placements[name]
        local = self.model.from_canonical(name, get, placement.axis.rank, placement.axis.size, placement.inner)
        assert local.shape == self.data_parallel.shapes[name], (
            f"{name}: {local.shape} is not {self.data_parallel.shapes[name]}"
        )
        return self.data_parallel.local_shard(name, local, self.data_parallel.shard_axis(name).rank)

    def parts(self) -> dict[str, Iterator[tuple[str, Tensor]]]:
        """Return the tensors that this rank writes, by part; all ranks must iterate over all parts, in this order."""
        self.data_parallel.wait()
        self._check_tied()
        return {"model": self._model_tensors(), "optim": self._optimizer_tensors()}

    def _check_tied(self) -> None:
        """Refuse to save a weight that several stages have if its values differ; every rank must call it."""
        local = self._local_shards()
        for name, shard in local.items():
            if (axis := self.data_parallel.placements[name].tied).size > 1:
                difference = axis.max_(shard.detach().clone()) + axis.max_(-shard.detach())
                if difference.any():
                    reason = f"differs between stages by up to {difference.abs().max().item():.3g}"
                    raise MtError(name, reason, "this is a fault of mt; resume from the last checkpoint, and report it")

    def owned_bytes(self) -> int:
        """Estimate the bytes that this rank writes: its share of the weights, of main parameters and of two moments."""
        weight, wide = self.data_parallel.dtype.itemsize, self._wide.itemsize
        state = (wide if wide != weight else 0) + 2 * wide
        frozen, rank = self._frozen_names(), self.data_parallel.mesh.world.rank
        mine = [name for name, writer in self._assign_writers().items() if writer == rank]
        elements = {
            name: self.data_parallel.shapes[name].numel() * self.data_parallel.placements[name].axis.size
            for name in mine
        }
        return sum(n * (weight if name in frozen else weight + state) for name, n in elements.items())

    def meta(self) -> dict[str, Any]:
        """Return the position and the loss scale, as plain values for a checkpoint's meta.json."""
        return {**asdict(self.position), "loss_scale": asdict(self.loss_scale)}

    def _model_tensors(self) -> Iterator[tuple[str, Tensor]]:
        local = self._local_shards()
        for name, writer in self._assign_writers().items():
            part = local[name].detach().to(self.data_parallel.dtype) if name in local else None
            yield from self._whole(name, part, writer, self.data_parallel.dtype)
        if self.data_parallel.mesh.data_context.rank == self.data_parallel.mesh.tensor.rank == 0:
            yield from ((name, buffer.detach().clone()) for name, buffer in self.stored_buffers().items())

    def _optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        counts, dtypes = self._optimizer_keys()
        frozen = self._frozen_names()
        for name, writer in self._assign_writers().items():
            if name in frozen:
                continue
            main_param = self.data_parallel.main_params.get(name)
            values: Mapping[str, Any] = {} if main_param is None else self.optimizer.state[main_param]
            if self.data_parallel.dtype != self._wide:
                whole = self._whole(name, None if main_param is None else main_param.detach(), writer, self._wide)
                yield from ((f"{MASTER}.{canonical}", tensor) for canonical, tensor in whole)
            for key, dtype in dtypes.items():
                whole = self._whole(name, values.get(key), writer, dtype)
                yield from ((f"{key}.{canonical}", tensor) for canonical, tensor in whole)
            if writer == self.data_parallel.mesh.world.rank:
                yield from ((f"{key}.{self._canonical_names(name)[0]}", value) for key, value in counts.items())

    def _optimizer_keys(self) -> tuple[dict[str, Tensor], dict[str, torch.dtype]]:
        """Return the optimizer's counts, which are equal for all parameters, and the dtypes of its other state.

        A rank without a main parameter gets them from the others.
        """
        state = next(
            (self.optimizer.state[m] for m in self.data_parallel.main_params.values() if self.optimizer.state[m]), {}
        )
        counts = {key: value.cpu() for key, value in state.items() if value.dim() == 0}
        local = counts, {key: state[key].dtype for key in sorted(state.keys() - counts.keys())}
        if self.data_parallel.mesh.world.size == 1:
            return local
        everyone = [local] * self.data_parallel.mesh.world.size
        dist.all_gather_object(everyone, local)
        return next((keys for keys in everyone if keys[1]), local)

    def _whole(self, name: str, part: Tensor | None, writer: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        return gather_whole(self.model, self.data_parallel, name, part, writer, dtype=dtype)

    @property
    def _wide(self) -> torch.dtype:
        """Data type of the main parameters."""
        return torch.promote_types(self.data_parallel.dtype, torch.float32)

    def _frozen_names(self) -> set[str]:
        """Return the names of parameters that are not trained, of which this rank may have no part."""
        return {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}

    def _assign_writers(self) -> dict[str, int]:
        """Assign each parameter of this rank's stages to the rank that writes it, in the model's order; one that
        several stages have is the first one's."""
        placements = self.data_parallel.placements
        sizes = {
            name: shape.numel() for name, shape in self.data_parallel.shapes.items() if not placements[name].tied.rank
        }
        writers = assign_writers(sizes, lambda _: self.data_parallel.mesh.stage_ranks)
        return {name: writers[name] for name in sizes}

    def _canonical_names(self, name: str) -> list[str]:
        return list(self.model.canonical_regions(name))

    def load(self, step: Path, precision: PrecisionConfig) -> None:
        """Fill weights, optimizer and position from a native checkpoint of the same model.

        Its layout and its precision may be others; `precision` is this run's, which the loss scale obeys.
        """
        with locked_for_reading(step):
            meta = read_meta(step)
            raise_if(self._optimizer_problems(step / "optim"))
            self.load_weights(step)
            self._load_optimizer(step)
        for key in asdict(self.position):
            setattr(self.position, key, meta[key])
        if "loss_scale" in meta:
            self.loss_scale.resume(precision, meta["loss_scale"], meta["config"].get("precision", {}))

    def load_weights(self, step: Path) -> None:
        """Fill the weights from the `model` part, which must hold exactly this model's tensors."""
        self.fill(check_names(step / "model", self.model.config.canonical_shapes()).__getitem__)

    def _optimizer_problems(self, directory: Path) -> Iterator[Problem]:
        """Report parameters that have optimizer state in a checkpoint and are not trained now, or the reverse."""
        entries = {name.partition(".")[2] for name, stored in open_part(directory).items() if stored.shape}
        local = {part for name in self.data_parallel.shapes for part in self._canonical_names(name)}
        frozen = {part for name in self._frozen_names() for part in self._canonical_names(name)}
        others = {*self.model.config.canonical_shapes()} - local  # of other stages
        trained = local - frozen
        allowed = f"keep the patterns of that run, or start a new one with checkpoint.init = native:{directory.parent}"
        for names, actual in (
            (trained - entries, "without optimizer state in the checkpoint"),
            (entries - trained - others, "with optimizer state in the checkpoint would be frozen"),
        ):
            if names and entries:
                rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
                yield Problem(WHERE, f"{min(names)}{rest} {actual}", allowed)

    @torch.no_grad()
    def _load_optimizer(self, step: Path) -> None:
        """Fill main parameters and optimizer state; state in the dtype of the main parameters gets that of today's."""
        self.data_parallel.wait()
        saved = open_part(step / "optim")
        weight = next(iter(open_part(step / "model").values()))
        saved_wide = torch.promote_types(weight.dtype, torch.float32)
        keys = sorted({name.split(".", 1)[0] for name in saved})
        for name, main_param in self.data_parallel.main_params.items():
            for key in keys:
                value = self._restore(key, name, saved)
                if key == MASTER:
                    main_param.copy_(value)
                    continue
                dtype = main_param.dtype if value.dim() and value.dtype == saved_wide else value.dtype
                self.optimizer.state[main_param][key] = value.to(main_param.device, dtype, copy=True)
        self.data_parallel.all_gather_params()

    def _restore(self, key: str, name: str, saved: Mapping[str, StoredTensor]) -> Tensor:
        first = saved[f"{key}.{self._canonical_names(name)[0]}"]
        if not first.shape:
            return first[...]
        return self._part(name, lambda canonical: saved[f"{key}.{canonical}"])
