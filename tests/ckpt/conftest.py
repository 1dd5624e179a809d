"""Tiny random Hugging Face models, saved by transformers itself, and plugins that exist during one test."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from mt_core.plugins import Component, hookimpl, manager

LLAMA: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {
    "vocab_size": 61,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 40,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def hugging_face_model(family: str, **changes: Any) -> Any:
    """A transformers model with random weights, biases and norms included."""
    torch.manual_seed(0)
    match family:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes}))
        case "mistral":
            model = MistralForCausalLM(MistralConfig(**{**LLAMA, **changes}))
        case _:
            model = GPT2LMHeadModel(GPT2Config(**{**GPT2, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[..., Path]:
    """`save_model("llama", tie_word_embeddings=True)` → a directory written by save_pretrained."""

    def save(family: str = "llama", *, shard: str = "5GB", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        path = tmp_path / f"{family}-source"
        hugging_face_model(family, **changes).to(dtype).save_pretrained(path, max_shard_size=shard)
        return path

    return save


@pytest.fixture
def add_component() -> Iterator[Callable[..., None]]:
    """`add_component("ckpt-saver", "name", "package.module:attribute")`: a third party's plugin, for one test."""
    added = []

    def add(kind: Any, name: str, target: str) -> None:
        class Plugin:
            @hookimpl
            def mt_components(self) -> list[Component]:
                return [Component(kind, name, target, "added by a test")]

        added.append(manager().register(Plugin(), name=f"test-{kind}-{name}"))

    yield add
    for name in added:
        manager().unregister(name=name)
