"""Writes Hugging Face format, as a member of the family asked for, or the first that carries the model exactly."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mt_ckpt.formats import SHARD_BYTES, FamilyName, ShardBytes
from mt_ckpt.huggingface.config import find_lost_settings, write_config
from mt_ckpt.huggingface.families import FAMILIES, fused
from mt_ckpt.huggingface.families.family import Config, Family
from mt_ckpt.tensor_streams.experts import unstack_experts
from mt_ckpt.tensor_streams.rotary_pairs import join_pairs
from mt_ckpt.tensor_streams.safetensors_directory import write_shards
from mt_ckpt.tensor_streams.tokenizer_files import GENERATION, special_ids
from mt_core.errors import MtError, Problem
from mt_core.files import atomic_directory
from mt_core.plugins import did_you_mean

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
CLOSEST = 3
"""Number of families that an error names when none carries a model."""


def save(
    path: Path,
    config: Config,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer_files: Sequence[Path] = (),
    *,
    target_model_type: FamilyName = None,
    shard_bytes: ShardBytes = SHARD_BYTES,
) -> None:
    """Write safetensors, config.json and the tokenizer's files, whole or not at all; bits and dtypes are unchanged."""
    family = choose_family(config, target_model_type)
    ids, described = special_ids(tokenizer_files), write_config(family, config)
    prefix = family.prefix if described["architectures"] == [family.base] else ""
    if family.interleaved:
        tensors = ((name, join_pairs(config, name, tensor)) for name, tensor in tensors)
    renamed = ((name.removeprefix(prefix), tensor) for name, tensor in _rename_tensors(family, tensors))
    with atomic_directory(path) as temporary:
        dtype = write_shards(temporary, fused.pack(family, renamed), shard_bytes)
        # transformers takes the family's ids where none are given; dtype is torch_dtype's name since release 5
        ids_and_dtype = {**ids, "dtype": dtype, "torch_dtype": dtype}
        _write_json(temporary / "config.json", {**dict.fromkeys(TOKEN_IDS), **described, **ids_and_dtype})
        for file in tokenizer_files:
            shutil.copy(file, temporary / file.name)
        if ids and not (temporary / GENERATION).exists():
            _write_json(temporary / GENERATION, ids)


def choose_family(config: Config, model_type: str | None = None) -> Family:
    """The family asked for, or the first that carries the configuration exactly; `MtError` says what stands in the way
    of it, or of those that come closest."""
    if model_type is not None and model_type not in FAMILIES:
        problem = f"unknown family {model_type!r}"
        raise MtError("--target-model-type", problem, did_you_mean(model_type, list(FAMILIES)))
    candidates = [FAMILIES[model_type]] if model_type else [*FAMILIES.values()]
    lost: dict[str, list[str]] = {}
    for family in candidates:
        if not isinstance(config, family.config):
            continue
        lost[family.model_type] = find_lost_settings(family, config)
        if not lost[family.model_type]:
            return family
    if not lost:
        kinds = sorted({family.config.model_fields["kind"].default for family in candidates})
        raise MtError("saver hf", f"cannot write a {config.kind!r} model", f"{' or '.join(kinds)}; or --saver native")
    raise MtError.from_problems(
        Problem(f"saver hf: {family}", f"cannot carry {', '.join(settings)}", "or use --saver native")
        for family, settings in sorted(lost.items(), key=lambda item: len(item[1]))[:CLOSEST]
    )


def _rename_tensors(family: Family, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for ours, tensor in unstack_experts(tensors):
        theirs = family.names.theirs(ours)
        assert theirs, f"{ours} is not a tensor of this model"
        yield theirs, tensor


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
