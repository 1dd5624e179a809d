"""Hugging Face directories: config.json says which family's tables to read the safetensors with."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from mt_ckpt.huggingface.config import read_config
from mt_ckpt.huggingface.families import FAMILIES, fused
from mt_ckpt.huggingface.families.family import Config, Family
from mt_ckpt.tensor_streams import tokenizer_files
from mt_ckpt.tensor_streams.experts import stack_experts, unstack_shapes
from mt_ckpt.tensor_streams.rotary_pairs import split_pairs
from mt_ckpt.tensor_streams.safetensors_directory import SafetensorsDir, read_json
from mt_ckpt.tensor_streams.streams import merge_copies, name_tied, set_problems
from mt_core.checkpoint.page_cache import drop_pages
from mt_core.errors import Problem, raise_if
from mt_models.config import GPTConfig


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
        tensors = self._rename(self.source.tensors())
        if self._family.interleaved:
            tensors = ((name, split_pairs(self._config, name, tensor)) for name, tensor in tensors)
        if mlp.kind == "moe":
            tensors = stack_experts(where, tensors, mlp.experts, used=drop_pages)
        yield from merge_copies(where, tensors, self._repeated, tied=self._tied)

    def tokenizer_files(self) -> list[Path]:
        """Files of the tokenizer in the directory, and the ids of special tokens that config.json alone declares."""
        return tokenizer_files.carry_token_ids(self._token_ids, tokenizer_files.find_tokenizer_files(self.path))

    @property
    def _token_ids(self) -> dict[str, Any]:
        """Ids that config.json declares; where it says nothing, those of the family."""
        return {**self._family.token_ids, **self._raw}

    def _unpack(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Single projections under the full names of the family's table."""
        return fused.unpack(self._family, self._config.canonical_shapes(), self._full_names(tensors))

    def _full_names(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        family = self._family
        has_prefix = any(entry.name.startswith(family.prefix) for entry in self.source.entries())
        for name, tensor in tensors:
            full = name if has_prefix or name.startswith("lm_head.") else family.prefix + name
            if not family.names.ignored(full):
                yield full, tensor

    def _rename(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._unpack(tensors):
            if ours := self._family.names.ours(name):
                yield ours, tensor

    def _header_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Canonical name and shape of every stored tensor."""
        tensors = self._rename(self.source.headers())
        return [(name_tied(name, tied=self._tied), tuple(tensor.shape)) for name, tensor in tensors]

    @property
    def _repeated(self) -> set[str]:
        """Canonical names under which several tensors are stored."""
        counts = Counter(name for name, _ in self._header_shapes())
        return {name for name, count in counts.items() if count > 1}

    def _check(self) -> None:
        """Account for every tensor by the files' headers."""
        where, expected = str(self.path), unstack_shapes(self._config.canonical_shapes())
        unpacked = dict(self._unpack(self.source.headers()))
        raise_if(self._find_further_layers(unpacked))
        unknown = [
            Problem(
                f"{where}: {name}",
                f"unexpected tensor of shape {tuple(unpacked[name].shape)}",
                f"a {self._family.model_type} model has no such tensor",
            )
            for name in self._family.names.unknown(unpacked)
        ]
        shapes = dict.fromkeys(self._header_shapes())  # copies count once
        raise_if([*unknown, *set_problems(where, expected, shapes)])

    def _find_further_layers(self, names: Iterable[str]) -> Iterator[Problem]:
        """Refuse stored layers that predict further tokens at once, not tensor by tensor."""
        family, config = self._family, self._config
        count = self._raw.get(family.further_layers)
        if not isinstance(count, int) or not isinstance(config, GPTConfig):
            return
        last = [f"{family.prefix}layers.{config.layers + number}." for number in range(count)]
        if stored := [name for name in names if name.startswith(tuple(last))]:
            actual = f"{len(stored)} tensors of layers that predict further tokens, {family.further_layers} = {count}"
            allowed = "mt predicts the next token alone: leave them out, as save_pretrained of transformers does"
            yield Problem(f"{self.path}: {last[0]}*", actual, allowed)
