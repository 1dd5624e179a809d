"""Hugging Face directories: config.json says which family's tables to read the safetensors with."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

from torch import Tensor

from mt_ckpt.huggingface.config import read_config
from mt_ckpt.huggingface.families import FAMILIES, fused
from mt_ckpt.huggingface.families.family import Config, Family
from mt_ckpt.tensor_streams import tokenizer_files
from mt_ckpt.tensor_streams.accounting import HEAD, drop_tied_head, set_problems
from mt_ckpt.tensor_streams.experts import stack_experts, unstack_shapes
from mt_ckpt.tensor_streams.sources import SafetensorsDir, read_json
from mt_core.checkpoint.page_cache import drop_pages
from mt_core.errors import Problem, raise_if


class HuggingFace:
    """A `CheckpointLoader` for the given families. Files, configuration and tensors are checked before any is read."""

    def __init__(self, path: Path, families: Mapping[str, Family] = FAMILIES) -> None:
        self.path, self.families = path, families
        self.source = SafetensorsDir(path)

    def config(self) -> Config:
        """The model's configuration, or one `MtError` naming everything in it that we do not implement."""
        return self._config

    @cached_property
    def _raw(self) -> dict[str, object]:
        return read_json(self.path / "config.json")

    @property
    def _family(self) -> Family:
        return self.families[str(self._raw["model_type"])]

    @cached_property
    def _config(self) -> Config:
        known = str(self._raw.get("model_type")) in self.families
        names = [name for name, _ in self._full_names(self.source.headers())] if known else []
        return read_config(self._raw, self.families, str(self.path / "config.json"), names)

    @property
    def _tied(self) -> bool:
        """A model that has no such setting has no output weight of its own."""
        return getattr(self._config, "tied", True)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Canonical name and tensor, one at a time; `MtError` if the files do not hold exactly the model's tensors."""
        self._check()
        where, mlp = str(self.path), self._config.mlp
        tensors = self._renamed(self.source.tensors())
        if mlp.kind == "moe":
            tensors = stack_experts(where, tensors, mlp.experts, used=drop_pages)
        yield from drop_tied_head(where, tensors) if self._tied else tensors

    def tokenizer_files(self) -> list[Path]:
        """Files of the tokenizer in the directory."""
        return tokenizer_files.find_tokenizer_files(self.path)

    def _unpacked(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Single projections under the full names of the family's table."""
        return fused.unpack(self._family, self._config.canonical_shapes(), self._full_names(tensors))

    def _full_names(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        family = self._family
        has_prefix = any(entry.name.startswith(family.prefix) for entry in self.source.entries())
        for name, tensor in tensors:
            full = name if has_prefix or name.startswith("lm_head.") else family.prefix + name
            if not family.names.ignored(full):
                yield full, tensor

    def _renamed(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._unpacked(tensors):
            if ours := self._family.names.ours(name):
                yield ours, tensor

    def _check(self) -> None:
        """Account for every tensor by the files' headers."""
        where, expected = str(self.path), unstack_shapes(self._config.canonical_shapes())
        unpacked = dict(self._unpacked(self.source.headers()))
        unknown = [
            Problem(
                f"{where}: {name}",
                f"unexpected tensor of shape {tuple(unpacked[name].shape)}",
                f"a {self._family.model_type} model has no such tensor",
            )
            for name in self._family.names.unknown(unpacked)
        ]
        shapes = [(name, tuple(tensor.shape)) for name, tensor in self._renamed(self.source.headers())]
        if self._tied and HEAD in dict(shapes):
            expected = expected | {HEAD: expected["embed.weight"]}
        raise_if([*unknown, *set_problems(where, expected, shapes)])
