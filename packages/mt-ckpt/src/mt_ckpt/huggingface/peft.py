"""Writes the adapters of a model, and nothing else, in the format of the library peft.

`PeftModel.from_pretrained(model, directory)` puts them on a model of transformers with the weights that were frozen.
"""

import json
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from torch import Tensor

from mt_ckpt.formats import BaseModel
from mt_ckpt.huggingface.families.family import Config, Family
from mt_ckpt.huggingface.saver import choose_family
from mt_core.checkpoint.safetensors_io import write_safetensors
from mt_core.errors import MtError
from mt_core.files import atomic_directory
from mt_models.config import GPTConfig
from mt_models.config.lora import ADAPTERS, LAYERS, Lora

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before the names of the model's modules."""
LEAVES = {"lora_a": "lora_A", "lora_b": "lora_B"}


def save(
    path: Path,
    config: Config,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer_files: Sequence[Path] = (),
    *,
    base_model_name: BaseModel = None,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors, whole or not at all; bits and dtypes are unchanged."""
    del tokenizer_files  # they are the frozen model's
    if not isinstance(config, GPTConfig) or config.lora is None:
        raise MtError("saver peft", "the model has no adapters", "one trained with model.lora; or --saver hf")
    family = choose_family(config.model_copy(update={"lora": None}))
    modules = {target: _get_module(family, target) for target in config.lora.targets}
    adapters = {_rename(family, name): tensor.clone() for name, tensor in tensors if fnmatch(name, ADAPTERS)}
    with atomic_directory(path) as temporary:
        write_safetensors(temporary / WEIGHTS, adapters, {"format": "pt"})
        settings = describe(config.lora, sorted(modules.values()), base_model_name)
        (temporary / SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def describe(lora: Lora, modules: Sequence[str], base_model: str | None) -> dict[str, object]:
    """The contents of adapter_config.json for adapters of these modules."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": [*modules],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _get_module(family: Family, target: str) -> str:
    """The last name of a projection's module in the family; one that is a part of a fused module is refused."""
    name = family.names.theirs(f"layers.0.{LAYERS[target]}.{target}.weight")
    assert name is not None, target
    module = name.removesuffix(".weight")
    parts = [part for fused in family.fused.values() for part in fused]
    if module.endswith((*parts, *family.transposed)):
        actual = f"{family.model_type} has {target} fused with others, or transposed, so that its adapter is no one's"
        raise MtError("saver peft", actual, "merge the adapters: --merge-lora --saver hf")
    return module.rpartition(".")[2]


def _rename(family: Family, name: str) -> str:
    module, leaf, weight = name.rsplit(".", 2)
    theirs = family.names.theirs(f"{module}.{weight}")
    assert theirs is not None, name
    return f"{PREFIX}{theirs.removesuffix(weight)}{LEAVES[leaf]}.{weight}"
