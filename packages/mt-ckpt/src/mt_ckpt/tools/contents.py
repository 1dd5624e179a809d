"""What lies on the disk for a checkpoint: its files, how many ranks wrote it, and a hash of every tensor."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mt_core.checkpoint import native
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.config.sections import Section
from mt_core.progress import progress

PARALLEL = ("data", "tensor", "pipeline", "context", "expert", "sharding")
"""Settings of `parallel` that say how a run was laid out."""


@dataclass(frozen=True)
class StoredFiles:
    """Where a checkpoint's bytes are."""

    directory: Path
    files: Mapping[str, int]
    """Path below the directory to size in bytes."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """What a native checkpoint says of its run: step, samples, tokens, and the layout that it was trained under."""


def read_stored_files(path: Path) -> StoredFiles:
    """The files of a checkpoint; of a native run, those of its latest step."""
    if not _is_native(path):
        return StoredFiles(path, _sizes(path))
    step = native.resolve(path)
    meta = native.read_meta(step)
    run = {key: meta[key] for key in ("step", "samples", "tokens") if key in meta}
    layout = {key: value for key, value in meta["config"].get("parallel", {}).items() if key in PARALLEL}
    return StoredFiles(step, _sizes(step), {**run, "format": meta["format"], "parallel": layout})


def _is_native(path: Path) -> bool:
    return (path / "meta.json").exists() or any(path.glob("step-*"))


def _sizes(directory: Path) -> dict[str, int]:
    files = [file for file in sorted(directory.rglob("*")) if file.is_file()]
    return {str(file.relative_to(directory)): file.stat().st_size for file in files}


def sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, row after row, as safetensors stores them; independent of the file around it."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def tensor_rows(path: Path, loader: str | None = None, *, hashed: bool = False) -> Iterator[dict[str, Any]]:
    """Name, shape, dtype, bytes and, if asked, SHA-256 of each tensor, in the model's order, as plain values."""
    source = open_checkpoint(path, loader)
    order = {name: place for place, name in enumerate(source.config().canonical_shapes())}
    rows = []
    with progress("hashing" if hashed else "reading", len(order), "tensors") as advance:
        for name, tensor in source.tensors():
            row = {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            rows.append({**row, "bytes": tensor.nbytes, **({"sha256": sha256(tensor)} if hashed else {})})
            advance(1)
    yield from sorted(rows, key=lambda row: order.get(row["name"], len(order)))


def as_json(path: Path, format: str, *, hashed: bool = False) -> dict[str, Any]:
    """Everything that `mt ckpt inspect` knows, as plain values."""
    source, tensors = open_checkpoint(path, format), list(tensor_rows(path, format, hashed=hashed))
    config, stored = source.config(), read_stored_files(getattr(source, "path", path))
    assert isinstance(config, Section)
    return {
        "path": str(path),
        "format": format,
        "config": config.model_dump(mode="json"),
        "tensors": tensors,
        "bytes": sum(row["bytes"] for row in tensors),
        "directory": str(stored.directory),
        "files": dict(stored.files),
        "run": dict(stored.run),
        "tokenizer_files": [file.name for file in source.tokenizer_files()],
    }
