"""What mt-ckpt provides: the `ckpt` command, and checkpoint formats by name."""

from collections.abc import Iterable
from typing import Any

from mt_core.errors import MtError, Problem
from mt_core.plugins import Component, Kind, hookimpl

REQUIRES = ("mt-ckpt",)
FAMILIES = "Llama, Mistral, Mixtral, Qwen 2 to 3, Gemma 1 and 2, Phi-3, GPT-2, BERT, T5"


HUGGING_FACE = f"Hugging Face: {FAMILIES}"
META_OR_HUGGING_FACE = "Llama and Mistral: Meta's consolidated files, or Hugging Face"
MEGATRON_CORE, MEGATRON_LEGACY = "Megatron-Core: GPT, BERT, T5", "Megatron's old classes: GPT, BERT, T5"
Rows = tuple[tuple[str, str, str, str], ...]
LOADERS: Rows = (
    ("native", "native.loader:Native", "NativeDeclaration", "mt's own format"),
    ("hf", "huggingface.loader:HuggingFace", "HuggingFaceDeclaration", HUGGING_FACE),
    ("llama_mistral", "meta.llama_mistral:llama_mistral", "MetaDeclaration", META_OR_HUGGING_FACE),
    ("mixtral_hf", "huggingface.mixtral_hf:mixtral_hf", "NoOptions", "Hugging Face: Mixtral only, by Megatron's name"),
    ("core", "megatron.loader:MegatronCoreLoader", "MegatronCoreDeclaration", MEGATRON_CORE),
    ("legacy", "megatron.legacy.loader:MegatronLegacyLoader", "MegatronLegacyDeclaration", MEGATRON_LEGACY),
    ("hub", "hub.transfer:load", "NoOptions", "A repository on the Hugging Face hub"),
)
"""Name, module and attribute below mt_ckpt, its declaration in mt_ckpt.formats, and what it reads."""
SAVERS: Rows = (
    ("native", "native.saver:save", "NoOptions", "mt's own format"),
    ("hf", "huggingface.saver:save", "HuggingFaceSaverDeclaration", HUGGING_FACE),
    ("peft", "huggingface.peft:save", "PeftSaverDeclaration", "Adapters of model.lora alone, for the library peft"),
    ("core", "megatron.saver:save", "MegatronCoreSaverDeclaration", MEGATRON_CORE),
    ("legacy", "megatron.legacy.saver:save", "MegatronLegacySaverDeclaration", MEGATRON_LEGACY),
)


@hookimpl
def mt_components() -> Iterable[Component]:
    """Components of mt-ckpt."""
    summary = "Convert, inspect, compare and share checkpoints"
    yield Component("command", "ckpt", "mt_ckpt.command:app", summary, REQUIRES)
    kinds: tuple[tuple[Kind, Rows], ...] = (("ckpt-loader", LOADERS), ("ckpt-saver", SAVERS))
    for kind, rows in kinds:
        for name, target, declaration, summary in rows:
            yield Component(kind, name, f"mt_ckpt.{target}", summary, REQUIRES, f"mt_ckpt.formats:{declaration}")


@hookimpl
def mt_config_rules(config: Any) -> list[Problem]:
    """A run that shall end in Hugging Face format needs a model that it can carry."""
    if config.checkpoint.save_format != "hf":
        return []
    from mt_ckpt.huggingface.saver import choose_family

    try:
        choose_family(config.model)
    except MtError as err:
        return list(err.problems)
    return []
