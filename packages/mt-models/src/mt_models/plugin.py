"""What mt-models provides: the models, attention cores and presets. Imports no torch."""

from collections.abc import Iterable
from typing import Any

from mt_core.errors import Problem
from mt_core.plugins import Component, hookimpl

PRESETS = {
    "gpt-tiny": "0.8 M parameters and 128 for each token id, for a CPU",
    "gpt2-124m": "GPT-2 small",
    "gpt-345m": "Megatron-LM's 345M model, GPT-2 medium's shape",
    "gpt3-175b": "GPT-3 175B",
    "llama2-7b": "Llama 2 7B",
    "llama3-8b": "Llama 3 8B",
    "mistral-7b": "Mistral 7B v0.1",
    "mixtral-8x7b": "Mixtral 8x7B, a mixture of experts",
    "mixtral-8x22b": "Mixtral 8x22B, a mixture of experts",
    "deepseek-v2-lite": "DeepSeek-V2-Lite, a mixture of experts with latent attention",
    "gemma-2-2b": "Gemma 2 2B",
    "qwen3-8b": "Qwen3 8B",
    "qwen3-30b-a3b": "Qwen3 30B-A3B, a mixture of 128 experts",
    "smollm2-135m": "SmolLM2 135M",
    "bert-345m": "Megatron-LM's BERT, BERT large's shape",
    "t5-220m": "Megatron-LM's T5, T5 base's shape",
}


@hookimpl
def mt_components() -> Iterable[Component]:
    """Components of mt-models."""
    cores = "mt_models.layers.attention_cores"
    return [
        Component("model", "gpt", "mt_models.config:GPTConfig", "decoder-only transformer of parts"),
        Component("model", "bert", "mt_models.config:BertConfig", "bidirectional transformer, with or without heads"),
        Component("model", "t5", "mt_models.config:T5Config", "encoder and decoder"),
        Component("attention", "sdpa", f"{cores}:sdpa", "torch's fused scaled-dot-product attention"),
        Component("attention", "eager", f"{cores}:eager", "attention written out, to check others against"),
        *(Component("preset", name, f"mt_models.presets:{name}.toml", text) for name, text in PRESETS.items()),
    ]


@hookimpl
def mt_config_rules(config: Any) -> list[Problem]:
    """Settings of a model that a component, or another section, cannot honour."""
    from mt_models import rules
    from mt_models.config import TransformerConfig

    return [*rules.problems(config)] if isinstance(config.model, TransformerConfig) else []
