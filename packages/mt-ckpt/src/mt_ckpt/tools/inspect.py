"""What a checkpoint holds: its tensors, its configuration, the files on the disk, and a hash of every tensor.

The report folds layers that are alike into one line; JSON has everything.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mt_core.checkpoint import native
from mt_core.checkpoint.detection import detect_loader, open_checkpoint
from mt_core.config.sections import Section
from mt_core.progress import progress

LAYER = re.compile(r"^layers\.(\d+)\.")
FILES_SHOWN = 16
"""Lines of files in the report; JSON has them all."""

PARALLEL = ("data", "tensor", "pipeline", "context", "expert", "expert_tensor", "sharding")
"""Settings of `parallel` that say how a run was laid out."""


@dataclass(frozen=True)
class Row:
    """Tensors that differ by their layer only."""

    name: str
    """With `{n}` for the layer."""
    layers: tuple[int, ...]
    """Empty for a tensor outside the layers."""
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    """Numbers in all the layers together."""
    bytes: int

    @property
    def label(self) -> str:
        """The name with the layers' numbers."""
        return self.name.replace("{n}", "{" + _ranges(self.layers) + "}")


@dataclass(frozen=True)
class StoredFiles:
    """Where a checkpoint's bytes are."""

    directory: Path
    files: Mapping[str, int]
    """Path below the directory to size in bytes."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """What a native checkpoint says of its run: step, samples, tokens, and the layout that it was trained under."""


@dataclass(frozen=True)
class Inspection:
    """A checkpoint at a glance."""

    path: Path
    format: str
    """The loader that reads it."""
    config: Section
    rows: tuple[Row, ...]
    tokenizer_files: tuple[str, ...]
    stored: StoredFiles

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(row.parameters for row in self.rows)

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(row.bytes for row in self.rows)


def inspect_checkpoint(
    path: Path, format: str | None = None, options: Mapping[str, Any] = MappingProxyType({})
) -> Inspection:
    """Read a checkpoint's configuration and its tensors' shapes; the format is detected from the files if not given."""
    format = format or detect_loader(path)
    loader = open_checkpoint(path, format, options)
    config = loader.config()
    assert isinstance(config, Section)
    order = {name: i for i, name in enumerate(config.canonical_shapes())}
    tensors = sorted(loader.tensors(), key=lambda pair: order.get(pair[0], len(order)))
    tokenizer = tuple(file.name for file in loader.tokenizer_files())
    return Inspection(
        path, format, config, _rows(tensors), tokenizer, read_stored_files(getattr(loader, "path", path), format)
    )


def _rows(tensors: Iterable[tuple[str, Tensor]]) -> tuple[Row, ...]:
    rows: dict[tuple[str, tuple[int, ...], str], list[tuple[int | None, Tensor]]] = {}
    for name, tensor in tensors:
        number = LAYER.match(name)
        key = (LAYER.sub("layers.{n}.", name), tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        rows.setdefault(key, []).append((int(number[1]) if number else None, tensor))
    return tuple(
        Row(
            *(name, tuple(n for n, _ in members if n is not None), shape, dtype),
            sum(t.numel() for _, t in members),
            sum(t.nbytes for _, t in members),
        )
        for (name, shape, dtype), members in rows.items()
    )


def read_stored_files(path: Path, format: str) -> StoredFiles:
    """The files of a checkpoint that the loader `format` reads; of a native run, those of its latest step."""
    if format != "native":
        return StoredFiles(path, _sizes(path))
    step = native.resolve(path)
    meta = native.read_meta(step)
    run = {key: meta[key] for key in ("step", "samples", "tokens") if key in meta}
    layout = _get_layout(meta["config"].get("parallel", {}))
    return StoredFiles(step, _sizes(step), {**run, "format": meta["format"], "parallel": layout})


def _get_layout(parallel: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that say how a run was laid out; unset, `expert_tensor` was all tensor ranks."""
    layout = {key: parallel[key] for key in PARALLEL if key in parallel}
    if "expert_tensor" in layout:
        layout["expert_tensor"] = layout["expert_tensor"] or layout.get("tensor", 1)
    return layout


def _sizes(directory: Path) -> dict[str, int]:
    files = [file for file in sorted(directory.rglob("*")) if file.is_file()]
    return {str(file.relative_to(directory)): file.stat().st_size for file in files}


def sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, row after row, as safetensors stores them; independent of the file around it."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def tensor_rows(
    path: Path,
    loader: str | None = None,
    *,
    hashed: bool = False,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[dict[str, Any]]:
    """Name, shape, dtype, bytes and, if asked, SHA-256 of each tensor, in the model's order, as plain values."""
    source = open_checkpoint(path, loader, options)
    order = {name: place for place, name in enumerate(source.config().canonical_shapes())}
    rows = []
    with progress("hashing" if hashed else "reading", len(order), "tensors") as advance:
        for name, tensor in source.tensors():
            row = {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            rows.append({**row, "bytes": tensor.nbytes, **({"sha256": sha256(tensor)} if hashed else {})})
            advance(1)
    yield from sorted(rows, key=lambda row: order.get(row["name"], len(order)))


def to_json(
    path: Path, format: str, *, hashed: bool = False, options: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """Everything that `mt ckpt inspect` knows, as plain values."""
    source = open_checkpoint(path, format, options)
    tensors = list(tensor_rows(path, format, hashed=hashed, options=options))
    config, stored = source.config(), read_stored_files(getattr(source, "path", path), format)
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


def _ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 → "0-2,5"."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def format_size(count: float) -> str:
    """Bytes in the largest unit that leaves at least one."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def format_report(inspection: Inspection) -> Iterator[str]:
    """The lines that `mt ckpt inspect` prints: a tree of tensors, totals and the configuration."""
    yield f"{inspection.path}  ({inspection.format} format)"
    width = max(len(row.label) for row in inspection.rows)
    for row in inspection.rows:
        shape = f"{list(row.shape)}"
        yield f"  {row.label:<{width}}  {shape:<16} {row.dtype:<9} {format_size(row.bytes):>8}"
    tensors = sum(max(1, len(row.layers)) for row in inspection.rows)
    yield f"  {tensors} tensors, {inspection.parameters:,} parameters, {format_size(inspection.bytes)}"
    yield "configuration"
    for name, value in inspection.config.model_dump(mode="json", exclude_none=True).items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        yield f"  {name:<14} {text}"
    yield from _stored_lines(inspection.stored)
    yield f"tokenizer files: {', '.join(inspection.tokenizer_files) or 'none'}"


def _stored_lines(stored: StoredFiles) -> Iterator[str]:
    for name, value in stored.run.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        if text != "":
            yield f"{name}: {text}"
    yield f"files: {len(stored.files)} in {stored.directory}, {format_size(sum(stored.files.values()))}"
    for name, size in list(stored.files.items())[:FILES_SHOWN]:
        yield f"  {format_size(size):>8}  {name}"
    if (more := len(stored.files) - FILES_SHOWN) > 0:
        yield f"  and {more} more; --json has them all"
