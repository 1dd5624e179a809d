"""Megatron's `torch_dist` format, read: tensors from chunks of any layout, layers under one key (§2.3-2.5)."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mt_ckpt.megatron import pickles
from mt_ckpt.megatron.dist_metadata import Chunk, Shape, read_metadata
from mt_ckpt.megatron.names import EMBED, HEAD, LAYER, engine_name, join, parameters, split, stored_shape
from mt_core.errors import MtError, Problem, raise_if
from mt_models.config import GPTConfig

COMMON = "common_state/shard_0_1"
NOT_MODEL = ("optimizer.", "chained_", "rng_state", "rerun_state_machine_state", "common_state")


class DistFiles:
    """An iteration's directory with .metadata and *.distcp files."""

    def __init__(self, path: Path) -> None:
        self.path, self.stored = path, read_metadata(path)
        if not (path / "metadata.json").is_file():
            raise MtError(str(path / "metadata.json"), "missing: its writing was interrupted", "use another iteration")
        chunks = [chunk for one in self.stored.values() for chunk in one.chunks]
        missing = sorted({chunk.file for chunk in chunks if not chunk.file.is_file()})
        raise_if(Problem(str(file), "missing", ".metadata names it: copy it") for file in missing)
        if (path / "common.pt").is_file():
            common = pickles.read(path / "common.pt")
        elif COMMON in self.stored:
            common = _read(self.stored[COMMON].chunks[0])[0]
        else:
            raise MtError(str(path), "holds neither common.pt nor common_state", "copy it again")
        self.args: Any = common.get("args")
        if self.args is None:
            raise MtError(str(path), "has no args, which say what the model is", "save it with Megatron's training")

    def tensors(self, config: GPTConfig) -> Iterator[tuple[str, Tensor]]:
        """Canonical tensors; `MtError` lists all that is wrong with keys and shapes before the first is read."""
        names = parameters(config)
        keys = {name: self._key(name) for name in names}
        raise_if(self._problems(config, keys))
        last: dict[Chunk, Tensor] = {}
        for name in sorted(names, key=lambda name: keys[name]):  # so that a chunk of many layers is read once
            box = self._box(keys[name], name, last)
            yield from split(config, join([box], names[name]), names[name]).items()

    def _key(self, name: str) -> str:
        """The key of a tensor: the engine's name without the layer's number, or one that older files have."""
        stacked = [LAYER.sub("decoder.layers.", known) for known in (engine_name(name), name)]
        return next((key for key in (*stacked, engine_name(name), name) if key in self.stored), stacked[0])

    def _problems(self, config: GPTConfig, keys: dict[str, str]) -> Iterator[Problem]:
        names = parameters(config)
        for name, key in keys.items():
            where, one = f"{self.path}: {key}", self.stored.get(key)
            if one is None or one.size is None:
                yield Problem(where, "tensor is missing", f"the model that args describe has {name}")
                continue
            rows = max(one.size[0], config.vocab_size) if name in (EMBED, HEAD) and one.size else None
            stacked = (config.layers,) if LAYER.match(name) and not LAYER.match(key) else ()
            right = stacked + stored_shape(config, names[name], 1, rows)
            if one.size != right:
                yield Problem(where, f"has shape {one.size}", f"args ask for {right}")
            if sum(math.prod(chunk.sizes) for chunk in one.chunks) != math.prod(one.size):
                yield Problem(where, "its chunks do not make up the whole tensor", "use another iteration")
        for key in sorted(self.stored.keys() - set(keys.values())):
            if self.stored[key].size is not None and not key.startswith(NOT_MODEL):
                yield Problem(f"{self.path}: {key}", "unexpected tensor", "the model that args describe has none such")

    def _box(self, key: str, name: str, last: dict[Chunk, Tensor]) -> Tensor:
        """The tensor, or one layer of it, put together from its chunks; the last chunk read is kept."""
        one, number = self.stored[key], LAYER.match(name)
        layer = int(number[1]) if number and not LAYER.match(key) else None
        whole = None
        for chunk in one.chunks:
            if layer is not None and not chunk.offsets[0] <= layer < chunk.offsets[0] + chunk.sizes[0]:
                continue
            if chunk not in last:
                last.clear()
                last[chunk] = _read(chunk)
            found, offsets = last[chunk], chunk.offsets
            if layer is not None:
                found, offsets = found[layer - offsets[0]], offsets[1:]
            if whole is None:
                whole = torch.empty((one.size or ())[0 if layer is None else 1 :], dtype=found.dtype)
            whole[_slices(offsets, tuple(found.shape))] = found
        assert whole is not None, key
        return whole


def _slices(offsets: Shape, sizes: Shape) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(offsets, sizes, strict=True))


def _read(chunk: Chunk) -> Any:
    with chunk.file.open("rb") as file:
        file.seek(chunk.start)
        return pickles.read_bytes(f"{chunk.file} at byte {chunk.start}", file.read(chunk.length))
