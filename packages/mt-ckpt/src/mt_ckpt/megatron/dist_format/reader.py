"""Megatron's `torch_dist` format, read: tensors from chunks of any layout, layers under one key.

Source: docs/specs/checkpoints.md §2.3 to §2.5.
"""

import math
from argparse import Namespace
from collections.abc import Iterator, Mapping
from copy import copy
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from torch import Tensor

from mt_ckpt.megatron.dist_format.chunks import ChunkLocation, ChunkReader, candidate_locations, join_gate_and_up
from mt_ckpt.megatron.dist_format.metadata import Stored, read_metadata
from mt_ckpt.megatron.parameters.fusion import VOCABULARY, canonical, join, stored_shape
from mt_ckpt.megatron.parameters.names import list_parameters, second_names
from mt_ckpt.megatron.parameters.table import Parameter, Shape
from mt_ckpt.megatron.torch_format import safe_unpickle
from mt_ckpt.tensor_streams.streams import bitwise_equal
from mt_core.errors import MtError, Problem, raise_if
from mt_models.config import TransformerConfig

COMMON = "common_state/shard_0_1"
NOT_MODEL = ("optimizer.", "chained_", "rng_state", "rerun_state_machine_state", "common_state")


class DistFiles:
    """An iteration's directory with .metadata and *.distcp files; `given` arguments go before those of the files."""

    def __init__(self, path: Path, *, given: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.path, self.stored, self.buffers = path, join_gate_and_up(read_metadata(path)), True
        if not (path / "metadata.json").is_file():
            raise MtError(str(path / "metadata.json"), "missing: its writing was interrupted", "use another iteration")
        chunks = [chunk for stored in self.stored.values() for chunk in stored.chunks]
        missing = sorted({chunk.file for chunk in chunks if not chunk.file.is_file()})
        raise_if(Problem(str(file), "missing", ".metadata names it: copy it") for file in missing)
        if (path / "common.pt").is_file():
            self.common: Any = safe_unpickle.read(path / "common.pt")
        elif COMMON in self.stored:
            self.common = self.stored[COMMON].chunks[0].read()[0]
        else:
            raise MtError(str(path), "holds neither common.pt nor common_state", "copy it again")
        args = self.common.get("args")
        if args is None and not given:
            allowed = "give --megatron-args, or save it with Megatron's training"
            raise MtError(str(path), "has no args, which say what the model is", allowed)
        self.args: Any = Namespace(**{**vars(args or Namespace()), **given})

    def holding(self, stored: Mapping[str, Stored]) -> Self:
        """A copy of the checkpoint with an optimizer's tensors of one kind under the model's keys, but for buffers'."""
        other = copy(self)
        other.stored, other.buffers = dict(stored), False
        return other

    def shapes(self) -> dict[str, Shape]:
        """Shapes of the tensors, by key."""
        return {key: stored.size for key, stored in self.stored.items() if stored.size is not None}

    def tensors(self, config: TransformerConfig) -> Iterator[tuple[str, Tensor]]:
        """Canonical tensors; `MtError` lists all that is wrong with keys and shapes before the first is read."""
        names = list_parameters(config, buffers=self.buffers)
        locations = {name: next(iter(known), None) for name, known in self._known(config, names).items()}
        raise_if(self._problems(config, names, locations))
        right = {name: place for name, place in locations.items() if place}
        ordered = sorted(names, key=lambda name: right[name].key)  # so that a chunk of many layers is read once
        boxes = ChunkReader(self.stored)
        for second, name in self._copies(config, names).items():
            if not bitwise_equal(boxes.read(ChunkLocation(second)), boxes.read(right[name])):
                found_there = f"differs from {right[name].key}, whose copy it is"
                raise MtError(f"{self.path}: {second}", found_there, "use another iteration")
        get = lambda name: join([boxes.read(right[name])], names[name])  # noqa: E731
        yield from canonical(config, {name: names[name] for name in ordered}, get)

    def _copies(self, config: TransformerConfig, names: Mapping[str, Parameter]) -> dict[str, str]:
        """Second names under which tensors are stored once more."""
        return {second: name for name in names for second in second_names(config, name) if second in self.stored}

    def _known(self, config: TransformerConfig, names: Mapping[str, Parameter]) -> dict[str, list[ChunkLocation]]:
        """Where each tensor is stored, of the places that any release puts it."""
        return {
            name: [place for place in candidate_locations(config, name) if place.key in self.stored] for name in names
        }

    def _problems(
        self, config: TransformerConfig, names: Mapping[str, Parameter], locations: Mapping[str, ChunkLocation | None]
    ) -> Iterator[Problem]:
        expected: set[str] = set()
        for name, place in locations.items():
            key = place.key if place else candidate_locations(config, name)[0].key
            where, stored = f"{self.path}: {key}", self.stored.get(key)
            if key in expected:
                continue
            expected.add(key)
            if place is None or stored is None or stored.size is None:
                yield Problem(where, "tensor is missing", f"the model that args describe has {name}")
                continue
            rows = (
                max(stored.size[0], config.vocab_size) if names[name].parts[0] in VOCABULARY and stored.size else None
            )
            right = place.counts + stored_shape(config, names[name], 1, rows)
            if stored.size != right:
                yield Problem(where, f"has shape {stored.size}", f"args ask for {right}")
            if sum(math.prod(chunk.sizes) for chunk in stored.chunks) != math.prod(stored.size):
                yield Problem(where, "its chunks do not make up the whole tensor", "use another iteration")
        expected.update(self._copies(config, names))
        for key in sorted(self.stored.keys() - expected):
            if self.stored[key].size is not None and not key.startswith(NOT_MODEL):
                yield Problem(f"{self.path}: {key}", "unexpected tensor", "the model that args describe has none such")
