"""What a checkpoint holds: its tensors with shape, dtype and size, layers that are alike folded into one line."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from torch import Tensor

from mt_ckpt.tools.contents import StoredFiles, read_stored_files
from mt_core.checkpoint.detection import detect_loader, open_checkpoint
from mt_core.config.sections import Section

LAYER = re.compile(r"^layers\.(\d+)\.")
FILES_SHOWN = 16
"""Lines of files in the report; JSON has them all."""


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


def inspect_checkpoint(path: Path, format: str | None = None) -> Inspection:
    """Read a checkpoint's configuration and its tensors' shapes; the format is detected from the files if not given."""
    format = format or detect_loader(path)
    loader = open_checkpoint(path, format)
    config = loader.config()
    assert isinstance(config, Section)
    order = {name: i for i, name in enumerate(config.canonical_shapes())}
    tensors = sorted(loader.tensors(), key=lambda pair: order.get(pair[0], len(order)))
    tokenizer = tuple(file.name for file in loader.tokenizer_files())
    return Inspection(path, format, config, _rows(tensors), tokenizer, read_stored_files(getattr(loader, "path", path)))


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


def report(inspection: Inspection) -> Iterator[str]:
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
