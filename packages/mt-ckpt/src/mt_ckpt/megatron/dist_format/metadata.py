"""`.metadata` of a torch_dist checkpoint, read safely: a pickle of which only plain records are let through.

Source: docs/specs/checkpoints.md §2.2.
"""

import pickle
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from mt_ckpt.megatron.torch_format.safe_unpickle import ADVICE, MEGATRON, StandIn, read_bytes
from mt_core.errors import MtError

RECORDS = ("torch.distributed.checkpoint.", MEGATRON)
"""Classes under these become stand-ins."""
PLAIN = {
    "torch.Size": torch.Size,
    "torch.serialization._get_layout": lambda name: name,
    "pathlib.PosixPath": PurePosixPath,
    "collections.OrderedDict": OrderedDict,
}
ORIGINAL = "nd_reformulated_orig_global_shape"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, or a whole object, and the bytes of a file that hold it."""

    file: Path
    start: int
    length: int
    offsets: Shape = ()
    sizes: Shape = ()

    def read(self) -> Any:
        """The tensor, or the object in a list."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            return read_bytes(f"{self.file} at byte {self.start}", file.read(self.length))


@dataclass(frozen=True)
class Stored:
    """A tensor, or an object, whose size is None."""

    size: Shape | None
    chunks: list[Chunk] = field(default_factory=list)
    original: Shape | None = None
    """The tensor's own shape, if the chunks are flat pieces of it (docs/specs/checkpoints.md §2.6)."""


def read_metadata(directory: Path) -> dict[str, Stored]:
    """What is stored, by key."""
    path = directory / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file, str(path)).load()
        flat = getattr(metadata, "mcore_data", None) or {}
        stored = {
            key: Stored(_size(value), original=flat.get(key, {}).get(ORIGINAL))
            for key, value in metadata.state_dict_metadata.items()
        }
        sizes = {
            (key, tuple(chunk.offsets)): tuple(chunk.sizes)
            for key, value in metadata.state_dict_metadata.items()
            for chunk in getattr(value, "chunks", ())
        }
        for index, info in metadata.storage_data.items():
            offsets = tuple(getattr(index, "offset", None) or ())  # absent if None
            file = directory / PurePosixPath(info.relative_path).name
            box = sizes.get((index.fqn, offsets), ())
            stored[index.fqn].chunks.append(Chunk(file, info.offset, info.length, offsets, box))
    except (pickle.UnpicklingError, EOFError, AttributeError, KeyError, TypeError, ValueError, IndexError) as err:
        raise MtError(str(path), f"truncated or not a directory of chunks ({err})", "copy it again") from None
    return stored


def _size(value: Any) -> Shape | None:
    return tuple(value.size) if hasattr(value, "size") else None


class _Unpickler(pickle.Unpickler):
    """Knows plain records only; whatever else a pickle names is refused, and nothing of it imported."""

    def __init__(self, file: Any, where: str) -> None:
        super().__init__(file)
        self.where = where

    def find_class(self, module_name: str, global_name: str) -> Any:
        """A stand-in, or one of the plain types."""
        full = f"{module_name}.{global_name}"
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype):
            return getattr(torch, global_name)
        if full in PLAIN:
            return PLAIN[full]
        if full.startswith(RECORDS):
            return StandIn
        raise MtError(self.where, f"its pickle wants to use {full}", ADVICE)
