"""Writes Hugging Face format, as a member of the first family that carries the model exactly."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mt_ckpt.families import FAMILIES
from mt_ckpt.families.family import Family
from mt_ckpt.hf_config import cannot_carry, write_config
from mt_ckpt.shards import SHARD_BYTES, write_shards
from mt_ckpt.tokenizer_files import special_ids
from mt_core.errors import MtError, Problem
from mt_core.files import atomic_directory
from mt_models.config import GPTConfig

GENERATION = "generation_config.json"


def save(
    path: Path,
    config: GPTConfig,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer_files: Sequence[Path] = (),
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write safetensors, config.json and the tokenizer's files, whole or not at all; bits and dtypes are unchanged."""
    family = carrier(config)
    ids = special_ids(tokenizer_files)
    with atomic_directory(path) as temporary:
        dtype = write_shards(temporary, family.pack(_renamed(family, tensors)), shard_bytes)
        # transformers takes Llama's ids where none are given; dtype is torch_dtype's name since release 5
        described = {"bos_token_id": None, "eos_token_id": None, **ids, "dtype": dtype, "torch_dtype": dtype}
        _write_json(temporary / "config.json", write_config(family, config) | described)
        for file in tokenizer_files:
            shutil.copy(file, temporary / file.name)
        if ids and not (temporary / GENERATION).exists():
            _write_json(temporary / GENERATION, ids)


def carrier(config: GPTConfig) -> Family:
    """The first family that carries the configuration exactly; `MtError` says what stands in each one's way."""
    if not isinstance(config, GPTConfig):
        raise MtError("saver hf", f"cannot write a {config.kind!r} model", "only gpt; or use --saver native")
    problems = []
    for family in FAMILIES.values():
        lost = cannot_carry(family, config)
        if not lost:
            return family
        problems.append(
            Problem(f"saver hf: {family.model_type}", f"cannot carry {', '.join(lost)}", "or use --saver native")
        )
    raise MtError.of(problems)


def _renamed(family: Family, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for ours, tensor in tensors:
        theirs = family.names.theirs(ours)
        assert theirs, f"{ours} is not a tensor of this model"
        yield theirs, tensor


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
