"""A `torch_dist` directory written tensor by tensor, by the recipe that every release since 0.11 reads (§2.7)."""

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mt_ckpt.megatron.dist_metadata import ORIGINAL
from mt_ckpt.megatron.dist_writer import CHUNKS, MARK, PROTOCOL
from mt_ckpt.megatron.torch_writer import TorchWriter


class ChunkFiles:
    """Tensors go to the disk as they come; `close` writes what says where they are."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self.directory, self.file = directory, (directory / CHUNKS).open("wb")
        self.known: dict[str, Any] = {}
        self.places: dict[MetadataIndex, _StorageInfo] = {}
        self.originals: dict[str, dict[str, tuple[int, ...]]] = {}

    def add(self, key: str, at: Sequence[int], size: Sequence[int], chunk: Tensor) -> None:
        """Write a chunk that lies at `at` in a tensor of this size."""
        self.known.setdefault(key, TensorStorageMetadata(TensorProperties(dtype=chunk.dtype), torch.Size(size), []))
        self.known[key].chunks.append(ChunkStorageMetadata(torch.Size(at), chunk.shape))
        self._append(MetadataIndex(key, torch.Size(at)), chunk)

    def add_flat(self, key: str, at: Sequence[int], fragments: Sequence[int], share: Tensor) -> None:
        """Write a rank's share of a tensor, flat, as 0.11's distributed optimizer does (§2.6)."""
        self.originals[key] = {ORIGINAL: tuple(n * size for n, size in zip(fragments, share.shape, strict=True))}
        flat = share.reshape([1] * share.dim() + [-1])
        self.add(key, [*at, 0], [*fragments, share.numel()], flat)

    def add_object(self, key: str, value: Any) -> None:
        """Write an object that is no tensor."""
        self.known[key] = BytesStorageMetadata()
        self._append(MetadataIndex(key), [value])

    def _append(self, index: MetadataIndex, value: Any) -> None:
        start, writer = self.file.tell(), TorchWriter(self.file)
        writer.close(writer.add(value) if isinstance(value, Tensor) else value)
        self.places[index] = _StorageInfo(CHUNKS, start, self.file.tell() - start)

    def close(self, common: Mapping[str, Any]) -> None:
        """Write the common state and the metadata; the mark that all is written comes last."""
        self.file.close()
        TorchWriter(self.directory / "common.pt").close(dict(common))
        metadata: Any = Metadata(self.known, None, self.places)
        if self.originals:
            metadata.mcore_data = {key: self.originals.get(key, {}) for key in self.known}
        (self.directory / ".metadata").write_bytes(pickle.dumps(metadata, PROTOCOL))
        (self.directory / "metadata.json").write_text(json.dumps(MARK))
