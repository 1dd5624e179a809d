"""Tiny random Hugging Face models, saved by transformers itself, and plugins that exist during one test."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mt_ckpt.conversion.convert import convert
from mt_ckpt.tensor_streams.safetensors_directory import SafetensorsDir

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
HEADS = {"head_dim": 10}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
DEEPSEEK: dict[str, Any] = {
    **(LLAMA | EXPERTS | {"num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 2}),
    **{"q_lora_rank": None, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5},
    "first_k_dense_replace": 1,
}
BERT = {name: value for name, value in LLAMA.items() if "token_id" not in name and "key_value" not in name}
T5: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 32,
    "d_kv": 10,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA),
    "mistral": ("Mistral", LLAMA),
    "mixtral": ("Mixtral", LLAMA | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", LLAMA | HEADS),
    "qwen3_moe": ("Qwen3Moe", LLAMA | HEADS | EXPERTS | {"num_experts": 5, "norm_topk_prob": True}),
    "deepseek_v2": ("DeepseekV2", DEEPSEEK),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK | {"n_group": 4, "topk_group": 2}),
    "gemma": ("Gemma", LLAMA | HEADS),
    "gemma2": ("Gemma2", LLAMA | HEADS | {"sliding_window": 7}),
    "phi3": ("Phi3", LLAMA | {"pad_token_id": None}),
    "gpt2": ("GPT2", GPT2),
    "bert": ("Bert", BERT),
    "megatron-bert": ("MegatronBert", BERT),
    "t5": ("T5", T5),
}
"""model_type to the stem of transformers' class names, and a tiny configuration."""


@pytest.fixture(scope="session", autouse=True)
def _temporary_folders_are_pytests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests share and cache, such as the rooms of the oracle tests, lies where pytest cleans up."""
    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp("shared"))
    yield
    tempfile.tempdir = before


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def hugging_face_model(family: str, auto_class: str = "AutoModelForCausalLM", **changes: Any) -> Any:
    """A transformers model with random weights, biases and norms included."""
    torch.manual_seed(0)
    stem, sizes = FAMILIES[family]
    config = getattr(transformers, f"{stem}Config")(**{**sizes, **changes})
    model = getattr(transformers, auto_class).from_config(config)
    if family == "t5" and not config.scale_decoder_outputs:  # transformers 5 ties it; files of v1.1 hold both weights
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(0.1 * torch.randn_like(buffer))
    return model.eval()


def bits(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Everything in a directory's safetensors."""
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for name, tensor in SafetensorsDir(path).tensors()
    }


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[..., Path]:
    """`save_model("llama", tie_word_embeddings=True)` → a directory written by save_pretrained."""

    def save(family: str = "llama", *, shard: str = "5GB", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        path = tmp_path / f"{family}-source"
        hugging_face_model(family, **changes).to(dtype).save_pretrained(path, max_shard_size=shard)
        return path

    return save


@pytest.fixture
def native(save_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A llama in mt's own format."""
    convert("hf", save_model("llama"), "native", tmp_path / "native")
    return tmp_path / "native"
