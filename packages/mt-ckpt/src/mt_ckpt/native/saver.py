"""Writes mt's own format: a run directory that holds the model as step 0."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from mt_core.checkpoint.native import write_model
from mt_core.config.sections import Section


def save(
    path: Path, config: Section, tensors: Iterable[tuple[str, Tensor]], tokenizer_files: Sequence[Path] = ()
) -> None:
    """Write a native checkpoint, whole or not at all."""
    write_model(path, config.model_dump(mode="json"), tensors, tokenizer_files)
