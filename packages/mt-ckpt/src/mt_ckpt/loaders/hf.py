"""Hugging Face directories: config.json says which family's tables to read the safetensors with."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

from torch import Tensor

from mt_ckpt import tokenizer_files
from mt_ckpt.accounting import HEAD, set_problems, without_tied_head
from mt_ckpt.families import FAMILIES
from mt_ckpt.families.family import Family
from mt_ckpt.hf_config import read_config
from mt_ckpt.sources import SafetensorsDir, read_json
from mt_core.errors import Problem, raise_if
from mt_models.config import GPTConfig


class HuggingFace:
    """A `CheckpointLoader` for the given families. Files, configuration and tensors are checked before any is read."""

    def __init__(self, path: Path, families: Mapping[str, Family] = FAMILIES) -> None:
        self.path, self.families = path, families
        self.source = SafetensorsDir(path)

    def config(self) -> GPTConfig:
        """The model's configuration, or one `MtError` naming everything in it that we do not implement."""
        return self._config

    @cached_property
    def _raw(self) -> dict[str, object]:
        return read_json(self.path / "config.json")

    @property
    def _family(self) -> Family:
        return self.families[str(self._raw["model_type"])]

    @cached_property
    def _config(self) -> GPTConfig:
        reading = read_config(self._raw, self.families, where=str(self.path / "config.json"))
        for note in reading.notes:
            print(f"note: {self.path}: {note}", file=sys.stderr)
        return reading.config

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Canonical name and tensor, one at a time; `MtError` if the files do not hold exactly the model's tensors."""
        self._check()
        renamed = self._renamed(self.source.tensors())
        yield from without_tied_head(str(self.path), renamed) if self._config.tied else renamed

    def tokenizer_files(self) -> list[Path]:
        """Files of the tokenizer in the directory."""
        return tokenizer_files.in_directory(self.path)

    def _unpacked(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        family = self._family
        has_prefix = any(entry.name.startswith(family.prefix) for entry in self.source.entries())
        for name, tensor in tensors:
            full = name if has_prefix or name.startswith("lm_head.") else family.prefix + name
            if not family.names.ignored(full):
                yield from family.unpack(full, tensor)

    def _renamed(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._unpacked(tensors):
            if ours := self._family.names.ours(name):
                yield ours, tensor

    def _check(self) -> None:
        """Account for every tensor by the files' headers."""
        where, expected = str(self.path), self._config.canonical_shapes()
        unpacked = dict(self._unpacked(self.source.headers()))
        unknown = [
            Problem(
                f"{where}: {name}",
                f"unexpected tensor of shape {tuple(unpacked[name].shape)}",
                f"a {self._family.model_type} model has no such tensor",
            )
            for name in self._family.names.unknown(unpacked)
        ]
        found = [(name, tuple(tensor.shape)) for name, tensor in self._renamed(self.source.headers())]
        if self._config.tied and HEAD in dict(found):
            expected = expected | {HEAD: expected["embed.weight"]}
        raise_if([*unknown, *set_problems(where, expected, found)])
