"""From any loader's format to any saver's, one tensor at a time; the result appears complete and, if asked, proven."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mt_ckpt.accounting import accounted
from mt_ckpt.dtypes import cast, dtype_named
from mt_ckpt.verify import Comparison, verify_conversion
from mt_core.errors import MtError
from mt_core.files import TEMPORARY, disk_errors, sync_directory
from mt_core.plugins import component
from mt_core.progress import progress
from mt_core.types import CheckpointLoader


@dataclass(frozen=True)
class Converted:
    """What a conversion did."""

    path: Path
    tensors: int
    parameters: int
    bytes: int
    tokenizer_files: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    """Empty unless verification was asked for."""


@dataclass
class _Count:
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0


def convert(
    loader: str,
    load_dir: Path,
    saver: str,
    save_dir: Path,
    *,
    dtype: str | None = None,
    verify: bool = False,
    model_type: str | None = None,
) -> Converted:
    """Convert a checkpoint. Tensors keep their dtype unless `dtype` is given.

    `MtError` if the tensors are not exactly the model's, if `model_type` is given and is not the source's, or if the
    verification finds a difference; nothing is left under `save_dir` then.
    """
    target = dtype_named(dtype) if dtype else None
    save, source = component("ckpt-saver", saver), component("ckpt-loader", loader)(load_dir)
    config, count = source.config(), _Count()
    if model_type and model_type.lower() != config.kind:
        raise MtError(f"--model-type {model_type}", f"{load_dir} holds a {config.kind!r} model", f"use {config.kind}")
    files = list(source.tokenizer_files())
    with staged(save_dir) as staging:
        save(staging, config, _stream(source, load_dir, target, count), files)
        proof = verify_conversion(source, load_dir, staging, target) if verify else ()
    names = tuple(file.name for file in files)
    return Converted(save_dir, count.tensors, count.parameters, count.bytes, names, proof)


def _stream(
    source: CheckpointLoader, where: Path, dtype: torch.dtype | None, count: _Count
) -> Iterator[tuple[str, Tensor]]:
    """The source's tensors, accounted for, cast and counted."""
    expected = source.config().canonical_shapes()
    with progress("converting", len(expected), "tensors") as advance:
        for name, tensor in accounted(str(where), expected, source.tensors()):
            tensor = cast(f"{where}: {name}", tensor, dtype) if dtype else tensor
            count.tensors += 1
            count.parameters += tensor.numel()
            count.bytes += tensor.nbytes
            yield name, tensor
            advance(1)


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A path beside `path` for a saver to write to; what is there moves to `path` when the block ends well."""
    if path.exists():
        raise MtError(str(path), "already exists", "choose another directory or remove it")
    room = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    with disk_errors(path):
        try:
            room.mkdir(parents=True)
            yield room / path.name
            (room / path.name).rename(path)
            sync_directory(path.parent)
        finally:
            shutil.rmtree(room, ignore_errors=True)
