"""A checkpoint with low-rank adapters, read as a plain model: each projection W becomes W + (alpha / rank) · B A."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from mt_core.contracts import CheckpointLoader
from mt_core.errors import MtError
from mt_models.config import GPTConfig
from mt_models.config.lora import LAYERS

WEIGHT, A, B = ".weight", ".lora_a.weight", ".lora_b.weight"


def merge_adapters(source: CheckpointLoader, where: Path) -> CheckpointLoader:
    """A loader for what another one reads at `where`, its adapters merged; `MtError` if there are none."""
    return cast(CheckpointLoader, MergedLora(source, where))


class MergedLora:
    """What a loader has but how it is opened: a checkpoint whose adapters are merged."""

    def __init__(self, source: CheckpointLoader, where: Path) -> None:
        config = source.config()
        if not isinstance(config, GPTConfig) or config.lora is None:
            raise MtError("--merge-lora", f"{where} has no adapters", "leave the option out")
        self.source, self.adapted, self.lora = source, config, config.lora

    def config(self) -> GPTConfig:
        """The model's configuration, without adapters."""
        return self.adapted.model_copy(update={"lora": None})

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Canonical name and tensor, one at a time; a projection waits for its adapter."""
        layers = range(self.adapted.layers)
        targets = {f"layers.{n}.{LAYERS[target]}.{target}" for n in layers for target in self.lora.targets}
        return _merge(self.source.tensors(), targets, self.lora.scale)

    def tokenizer_files(self) -> Sequence[Path]:
        """Files of the tokenizer that travels with the checkpoint."""
        return self.source.tokenizer_files()


def _merge(tensors: Iterable[tuple[str, Tensor]], targets: set[str], scale: float) -> Iterator[tuple[str, Tensor]]:
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        leaf = next(leaf for leaf in (A, B, WEIGHT, "") if name.endswith(leaf))
        module = name.removesuffix(leaf)
        if not leaf or module not in targets:
            yield name, tensor
            continue
        parts = waiting.setdefault(module, {})
        parts[leaf] = tensor
        if len(parts) == len((WEIGHT, A, B)):
            yield module + WEIGHT, _add(parts[WEIGHT], parts[A], parts[B], scale)
            del waiting[module]


def _add(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale · B A, computed in fp32 or wider and rounded to the weight's dtype."""
    wide = torch.promote_types(torch.promote_types(weight.dtype, b.dtype), torch.float32)
    return (weight.to(wide) + scale * (b.to(wide) @ a.to(wide))).to(weight.dtype)
