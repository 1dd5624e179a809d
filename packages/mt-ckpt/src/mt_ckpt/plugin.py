"""What mt-ckpt provides: the `ckpt` command, and checkpoint formats by name."""

from collections.abc import Iterable
from typing import Any

from mt_core.errors import MtError, Problem
from mt_core.plugins import Component, hookimpl

REQUIRES = ("mt-ckpt",)
FAMILIES = "Llama, Mistral, Mixtral, Qwen 2 to 3, Gemma 1 and 2, Phi-3, GPT-2, BERT, T5"


@hookimpl
def mt_components() -> Iterable[Component]:
    """Components of mt-ckpt."""
    return [
        Component(
            "command", "ckpt", "mt_ckpt.command:app", "Convert, inspect, compare and share checkpoints", REQUIRES
        ),
        Component("ckpt-loader", "native", "mt_ckpt.native.loader:Native", "mt's own format", REQUIRES),
        Component("ckpt-loader", "hf", "mt_ckpt.huggingface.loader:HuggingFace", f"Hugging Face: {FAMILIES}", REQUIRES),
        Component(
            "ckpt-loader",
            "llama_mistral",
            "mt_ckpt.meta.llama_mistral:llama_mistral",
            "Llama and Mistral: Meta's consolidated files, or Hugging Face",
            REQUIRES,
        ),
        Component(
            "ckpt-loader",
            "mixtral_hf",
            "mt_ckpt.huggingface.mixtral_hf:mixtral_hf",
            "Hugging Face: Mixtral only, by Megatron's name",
            REQUIRES,
        ),
        Component(
            "ckpt-loader",
            "core",
            "mt_ckpt.megatron.loader:MegatronCoreLoader",
            "Megatron-Core: GPT, BERT, T5",
            REQUIRES,
        ),
        Component("ckpt-saver", "core", "mt_ckpt.megatron.saver:save", "Megatron-Core: GPT, BERT, T5", REQUIRES),
        Component(
            "ckpt-loader",
            "legacy",
            "mt_ckpt.megatron.legacy.loader:MegatronLegacyLoader",
            "Megatron's old classes: GPT, BERT, T5",
            REQUIRES,
        ),
        Component(
            "ckpt-saver",
            "legacy",
            "mt_ckpt.megatron.legacy.saver:save",
            "Megatron's old classes: GPT, BERT, T5",
            REQUIRES,
        ),
        Component("ckpt-loader", "hub", "mt_ckpt.hub.transfer:load", "A repository on the Hugging Face hub", REQUIRES),
        Component("ckpt-saver", "native", "mt_ckpt.native.saver:save", "mt's own format", REQUIRES),
        Component("ckpt-saver", "hf", "mt_ckpt.huggingface.saver:save", f"Hugging Face: {FAMILIES}", REQUIRES),
    ]


@hookimpl
def mt_config_rules(config: Any) -> list[Problem]:
    """A run that shall end in Hugging Face format needs a model that it can carry."""
    if config.checkpoint.save_format != "hf":
        return []
    from mt_ckpt.huggingface.saver import carrier

    try:
        carrier(config.model)
    except MtError as err:
        return list(err.problems)
    return []
