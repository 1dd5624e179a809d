"""A `torch_dist` directory written tensor by tensor, by the recipe that every release since 0.11 reads.

Source: docs/specs/checkpoints.md §2.7.
"""

import json
import math
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mt_ckpt.megatron.dist_format.chunks import ChunkLocation
from mt_ckpt.megatron.dist_format.metadata import ORIGINAL
from mt_ckpt.megatron.parameters.fusion import Rows
from mt_ckpt.megatron.parameters.table import Shape
from mt_ckpt.megatron.torch_format.streaming_save import TorchWriter

CHUNKS, METADATA_PROTOCOL = "__0_0.distcp", 4
MARK = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""metadata.json, whose presence says that all is written."""


class ChunkFiles:
    """Tensors go to the disk as they come; `close` writes what says where they are."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self.directory, self.file = directory, (directory / CHUNKS).open("wb", buffering=0)
        self.known: dict[str, Any] = {}
        self.places: dict[MetadataIndex, _StorageInfo] = {}
        self.originals: dict[str, dict[str, tuple[int, ...]]] = {}

    def add(self, key: str, place: ChunkLocation, chunk: Rows) -> None:
        """Write a tensor, which lies at `place` among those of its key."""
        at, size = (*place.at, *[0] * len(chunk.shape)), (*place.counts, *chunk.shape)
        self._add(key, at, size, chunk, (*[1] * len(place.at), *chunk.shape))

    def add_flat(self, key: str, at: Sequence[int], fragments: Sequence[int], share: Rows) -> None:
        """Write a rank's share of a tensor, flat, as 0.11's distributed optimizer does.

        Source: docs/specs/checkpoints.md §2.6.

        `at` and `fragments` count the shares along the tensor's dims, those of layers and experts included.
        """
        numel, shape = math.prod(share.shape), (*[1] * (len(at) - len(share.shape)), *share.shape)
        self.originals[key] = {ORIGINAL: tuple(n * size for n, size in zip(fragments, shape, strict=True))}
        self._add(key, (*at, 0), (*fragments, numel), share, (*[1] * len(at), numel))

    def add_object(self, key: str, value: Any) -> None:
        """Write an object that is no tensor."""
        self.known[key] = BytesStorageMetadata()
        self._finish(TorchWriter(self.file), MetadataIndex(key), [value])

    def _add(self, key: str, at: Shape, size: Shape, rows: Rows, shape: Shape) -> None:
        """Write rows, in another shape, as the chunk at `at` of a tensor of this size."""
        self.known.setdefault(key, TensorStorageMetadata(TensorProperties(dtype=rows.dtype), torch.Size(size), []))
        self.known[key].chunks.append(ChunkStorageMetadata(torch.Size(at), torch.Size(shape)))
        writer = TorchWriter(self.file)
        self._finish(writer, MetadataIndex(key, torch.Size(at)), writer.add(*rows.blocks).view(shape))

    def _finish(self, writer: TorchWriter, index: MetadataIndex, value: Any) -> None:
        self.places[index] = _StorageInfo(CHUNKS, writer.start, writer.close(value))

    def close(self, common: Mapping[str, Any]) -> None:
        """Write the common state and the metadata; the mark that all is written comes last."""
        self.file.close()
        torch.save(dict(common), self.directory / "common.pt")
        metadata: Any = Metadata(self.known, None, self.places)
        if self.originals:
            metadata.mcore_data = {key: self.originals.get(key, {}) for key in self.known}
        (self.directory / ".metadata").write_bytes(pickle.dumps(metadata, METADATA_PROTOCOL))
        (self.directory / "metadata.json").write_text(json.dumps(MARK))
