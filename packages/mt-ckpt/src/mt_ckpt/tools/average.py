"""The weighted mean of several checkpoints of one model, one tensor at a time, in fp32."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mt_ckpt.tensor_streams.streams import align_streams, check_stream, set_problems
from mt_ckpt.tools.differences import changed_settings
from mt_core.checkpoint.detection import detect_loader
from mt_core.contracts import CheckpointLoader
from mt_core.errors import MtError, Problem, raise_if
from mt_core.files import atomic_path
from mt_core.plugin_options import assign_options, read_options
from mt_core.plugins import component
from mt_core.progress import progress


def average(
    paths: Sequence[Path],
    save_dir: Path,
    *,
    weights: Sequence[float] | None = None,
    loader: str | None = None,
    saver: str = "native",
    options: Mapping[str, Any] = MappingProxyType({}),
) -> int:
    """Write the mean, with the first checkpoint's dtypes and tokenizer; returns how many tensors it has.

    `weights` are divided by their sum. `options` are those of the loaders, each checkpoint's own if none is named, and
    of the saver. Checkpoints of another configuration are refused, all differences named.
    """
    shares = normalize_weights(weights or [1.0] * len(paths), len(paths))
    save, names = component("ckpt-saver", saver), [loader or detect_loader(path) for path in paths]
    load = {name: component("ckpt-loader", name) for name in names}
    declared = {f"loader {name}": read_options(load[name]) for name in load} | {f"saver {saver}": read_options(save)}
    *given, saver_options = assign_options(options, declared)
    loader_options = dict(zip(load, given, strict=True))
    loaders = [load[name](path, **loader_options[name]) for name, path in zip(names, paths, strict=True)]
    raise_if(_unlike(paths, loaders))
    config, written = loaders[0].config(), []
    shapes = dict(config.canonical_shapes())
    with progress("averaging", len(shapes), "tensors") as advance:

        def stream() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in check_stream(str(paths[0]), shapes, _means(paths, loaders, shares)):
                yield name, tensor
                written.append(name)
                advance(1)

        with atomic_path(save_dir) as staging:
            save(staging, config, stream(), loaders[0].tokenizer_files(), **saver_options)
    return len(written)


def normalize_weights(weights: Sequence[float], count: int) -> list[float]:
    """Weights divided by their sum."""
    if count < 2:
        raise MtError("average", "one checkpoint", "give two or more")
    if len(weights) != count:
        raise MtError("--weights", f"{len(weights)} weights for {count} checkpoints", "give one for each")
    total = sum(weights)
    if not math.isfinite(total) or total <= 0:
        raise MtError("--weights", f"their sum is {total:g}", "it must be above 0")
    return [weight / total for weight in weights]


def parse_weights(text: str) -> list[float]:
    """ "0.7,0.3" → [0.7, 0.3]."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as err:
        raise MtError("--weights", repr(text), "give numbers with commas between, for example 0.7,0.3") from err


def _unlike(paths: Sequence[Path], loaders: Sequence[CheckpointLoader]) -> Iterator[Problem]:
    for path, loader in zip(paths[1:], loaders[1:], strict=True):
        for key, ours, theirs in changed_settings(loaders[0], loader):
            yield Problem(f"{path}: {key}", f"{theirs}, but {paths[0]} has {ours}", "average checkpoints of one model")


def _means(
    paths: Sequence[Path], loaders: Sequence[CheckpointLoader], shares: Sequence[float]
) -> Iterator[tuple[str, Tensor]]:
    problems: list[Problem] = []
    for name, tensors in align_streams([loader.tensors() for loader in loaders]):
        whole = [tensor for tensor in tensors if tensor is not None]
        if len(whole) == len(tensors) and len({tensor.shape for tensor in whole}) == 1:
            yield name, mean(whole, shares)
        else:
            problems += _lacking(name, paths, tensors, loaders)
    raise_if(problems)


def mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Σ share × tensor, in fp32 (or the tensors' wider dtype), rounded once to the first one's dtype."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    total = torch.zeros(tensors[0].shape, dtype=wide)
    for tensor, share in zip(tensors, shares, strict=True):
        total.add_(tensor.to(wide), alpha=share)
    return total.to(tensors[0].dtype)


def _lacking(
    name: str, paths: Sequence[Path], tensors: Iterable[Tensor | None], loaders: Sequence[CheckpointLoader]
) -> Iterator[Problem]:
    shape = loaders[0].config().canonical_shapes().get(name)
    expected = {name: shape} if shape else {}
    for path, tensor in zip(paths, tensors, strict=True):
        yield from set_problems(str(path), expected, [] if tensor is None else [(name, tuple(tensor.shape))])
