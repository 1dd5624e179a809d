"""What mt-models provides: the model `gpt`, attention cores and presets. Imports no torch."""

from collections.abc import Iterable
from typing import Any

from mt_core.errors import Problem
from mt_core.plugins import Component, components, did_you_mean, hookimpl

PRESETS = {
    "gpt-tiny": "1.3 M parameters, for a CPU",
    "gpt2-124m": "GPT-2 small",
    "gpt-345m": "Megatron-LM's 345M model, GPT-2 medium's shape",
    "gpt3-175b": "GPT-3 175B",
    "llama2-7b": "Llama 2 7B",
    "llama3-8b": "Llama 3 8B",
    "mistral-7b": "Mistral 7B v0.1, without its sliding window",
    "smollm2-135m": "SmolLM2 135M",
}


@hookimpl
def mt_components() -> Iterable[Component]:
    """Components of mt-models."""
    cores = "mt_models.layers.attention_cores"
    return [
        Component("model", "gpt", "mt_models.config:GPTConfig", "decoder-only transformer of parts"),
        Component("attention", "sdpa", f"{cores}:sdpa", "torch's fused scaled-dot-product attention"),
        Component("attention", "eager", f"{cores}:eager", "attention written out, to check others against"),
        *(Component("preset", name, f"mt_models.presets:{name}.toml", text) for name, text in PRESETS.items()),
    ]


@hookimpl
def mt_config_rules(config: Any) -> list[Problem]:
    """The attention core of a GPT must be an installed one."""
    from mt_models.config import GPTConfig

    known = ["auto", *components("attention")]
    if not isinstance(config.model, GPTConfig) or config.model.attention.core in known:
        return []
    core = config.model.attention.core
    return [Problem("model.attention.core", f"unknown attention core {core!r}", did_you_mean(core, known))]
