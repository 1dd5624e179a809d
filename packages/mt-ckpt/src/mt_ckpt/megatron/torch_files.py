"""Megatron's `torch` format, read: the files of all model-parallel ranks, put together tensor by tensor (§1, §3).

Files are memory-mapped and checked by their tensors' shapes before any tensor is read.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mt_ckpt.megatron import pickles
from mt_ckpt.megatron.layout import RANK_FILE, rank_directory
from mt_ckpt.megatron.names import EMBED, HEAD, IGNORED, LAYER, join, local_name, parameters, split, stored_shape
from mt_core.errors import MtError, Problem, raise_if
from mt_models.config import GPTConfig

State = Mapping[str, Any]
CHUNK = re.compile(r"model\d*")
"""`model`, or with virtual stages `model0`, `model1`, …"""


class TorchFiles:
    """An iteration's directory of `mp_rank_*` files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        first = min(path.glob(f"mp_rank_*/{RANK_FILE}"), default=None)
        if first is None:
            raise MtError(str(path), f"holds no mp_rank_*/{RANK_FILE}", "copy the checkpoint again")
        self.args: Any = _state(first).get("args")
        if self.args is None:
            found = "has no args, which say what the model is (files of NGC and before 2020)"
            raise MtError(str(first), found, "load it in Megatron and save it again")
        self.tensor = getattr(self.args, "tensor_model_parallel_size", 1)
        self.pipeline = getattr(self.args, "pipeline_model_parallel_size", 1)

    def tensors(self, config: GPTConfig) -> Iterator[tuple[str, Tensor]]:
        """Canonical tensors; `MtError` lists all that is wrong with files, names and shapes before the first."""
        names, rows = parameters(config), self.args.padded_vocab_size
        held = self._held(config)
        copies = held.pop(HEAD, None) if config.tied else None
        raise_if(self._problems(config, held, rows))
        if copies and not all(map(torch.equal, copies, held[EMBED])):
            found = "the last stage's copy of the embedding differs from the first stage's, to which args tie it"
            raise MtError(str(self.path), found, "set args.untie_embeddings_and_output_weights if it was trained so")
        for name, one in names.items():
            yield from split(config, join(held[name], one), one).items()

    def _problems(self, config: GPTConfig, held: Mapping[str, list[Tensor]], rows: int) -> Iterator[Problem]:
        names = parameters(config)
        for name in sorted(names.keys() | held.keys()):
            where = f"{self.path}: {name}"
            if name not in names:
                yield Problem(where, "unexpected tensor", "the model that args describe has none of this name")
            elif len(held.get(name, ())) != self.tensor:
                yield Problem(where, f"stored by {len(held.get(name, ()))} ranks", f"all {self.tensor} should have it")
            else:
                right = stored_shape(config, names[name], self.tensor, rows)
                for rank, tensor in enumerate(held[name]):
                    if tuple(tensor.shape) != right:
                        found = f"has shape {tuple(tensor.shape)} on tensor rank {rank}"
                        yield Problem(where, found, f"args ask for {right}")

    def _held(self, config: GPTConfig) -> dict[str, list[Tensor]]:
        """Memory-mapped tensors of all tensor ranks by local name, layers numbered through the stages."""
        held: dict[str, list[Tensor]] = {}
        files = self._files()
        chunks = sorted((key for key in files[0][0] if CHUNK.fullmatch(key)), key=lambda key: int(key[5:] or 0))
        for ranks in files.values():
            for rank in range(self.tensor):
                if missing := [chunk for chunk in chunks if chunk not in ranks[rank]]:
                    raise MtError(str(self.path), f"a rank lacks {', '.join(missing)}", "copy the checkpoint again")
        first = 0
        for chunk in chunks:
            for ranks in files.values():
                states = [ranks[rank][chunk] for rank in range(self.tensor)]
                for state in states:
                    for name, tensor in state.items():
                        if isinstance(tensor, Tensor) and not IGNORED.search(name):
                            held.setdefault(_numbered(local_name(name), first), []).append(tensor)
                first += len({number[1] for name in states[0] if (number := LAYER.match(name))})
        return held

    def _files(self) -> dict[int, dict[int, State]]:
        """Stage to tensor rank to contents; every missing file is named."""
        paths = {
            (stage, rank): self.path / rank_directory(rank, stage, self.pipeline) / RANK_FILE
            for stage in range(self.pipeline)
            for rank in range(self.tensor)
        }
        raise_if(
            Problem(str(path), "missing", f"args say {self.tensor} tensor ranks and {self.pipeline} stages: copy it")
            for path in paths.values()
            if not path.is_file()
        )
        files: dict[int, dict[int, State]] = {stage: {} for stage in range(self.pipeline)}
        for (stage, rank), path in paths.items():
            files[stage][rank] = _state(path)
        return files


def _state(path: Path) -> State:
    found = pickles.read(path)
    if not isinstance(found, dict):
        raise MtError(str(path), f"holds a {type(found).__name__}", "a file that Megatron saved holds a dict")
    return found


def _numbered(name: str, first: int) -> str:
    """The name with the layer's number in the whole model; `first` is that of its stage's first layer."""
    return LAYER.sub(lambda number: f"decoder.layers.{int(number[1]) + first}.", name)
