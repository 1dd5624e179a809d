"""From any loader's format to any saver's, one tensor at a time; the result appears complete and, if asked, proven."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mt_ckpt.conversion.merge_lora import merge_adapters
from mt_ckpt.conversion.verify import Comparison, verify_conversion
from mt_ckpt.tensor_streams.streams import cast, check_stream, parse_dtype
from mt_ckpt.tensor_streams.tokenizer_files import size_problems
from mt_core.checkpoint.page_cache import trim
from mt_core.contracts import CheckpointLoader
from mt_core.errors import MtError, raise_if
from mt_core.files import atomic_path
from mt_core.plugin_options import assign_options, read_options
from mt_core.plugins import component
from mt_core.progress import progress

ADAPTERS_ALONE = "peft"
"""The saver whose results are no models."""
TRIM_BYTES = 64 << 20
"""After so many bytes of tensors, memory that was freed goes back to the kernel."""


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
    merge_lora: bool = False,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Converted:
    """Convert a checkpoint. Tensors keep their dtype unless `dtype` is given; adapters are kept unless they are merged.

    `options` are keyword-only parameters of the loader, of the saver, or of both; texts are read as their types say.

    `MtError` if the tensors are not exactly the model's, if `model_type` is given and is not the source's, or if the
    verification finds a difference; nothing is left under `save_dir` then.
    """
    target = parse_dtype(dtype) if dtype else None
    save, load = component("ckpt-saver", saver), component("ckpt-loader", loader)
    declared = {f"loader {loader}": read_options(load), f"saver {saver}": read_options(save)}
    loader_options, saver_options = assign_options(options, declared)
    if verify and saver == ADAPTERS_ALONE:
        raise MtError("--verify", "adapters alone compute no logits", "verify --merge-lora --saver hf instead")
    source: CheckpointLoader = load(load_dir, **loader_options)
    source = merge_adapters(source, load_dir) if merge_lora else source
    config, count = source.config(), _Count()
    if model_type and model_type.lower() != config.kind:
        raise MtError(f"--model-type {model_type}", f"{load_dir} holds a {config.kind!r} model", f"use {config.kind}")
    files = list(source.tokenizer_files())
    raise_if(size_problems(files, config.vocab_size))
    with atomic_path(save_dir) as staging:
        save(staging, config, _stream(source, load_dir, target, count), files, **saver_options)
        if count.tensors < (expected := len(config.canonical_shapes())):
            shortfall = f"took only {count.tensors} of {expected} tensors"
            raise MtError(f"saver {saver}", shortfall, "it must write every tensor: report this to its author")
        proof = verify_conversion(source, load_dir, staging, target) if verify else ()
    names = tuple(file.name for file in files)
    return Converted(save_dir, count.tensors, count.parameters, count.bytes, names, proof)


def _stream(
    source: CheckpointLoader, where: Path, dtype: torch.dtype | None, count: _Count
) -> Iterator[tuple[str, Tensor]]:
    """The source's tensors, accounted for, cast and counted."""
    expected, trimmed = source.config().canonical_shapes(), 0
    with progress("converting", len(expected), "tensors") as advance:
        for name, tensor in check_stream(str(where), expected, source.tensors()):
            tensor = cast(f"{where}: {name}", tensor, dtype) if dtype else tensor
            count.tensors += 1
            count.parameters += tensor.numel()
            count.bytes += tensor.nbytes
            yield name, tensor
            del tensor  # or it would be in memory while the next one is made
            if count.bytes - trimmed > TRIM_BYTES:
                trimmed = count.bytes
                trim()
            advance(1)
