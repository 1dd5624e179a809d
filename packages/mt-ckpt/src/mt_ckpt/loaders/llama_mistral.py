"""Megatron's name for the loader of Hugging Face Llama and Mistral models."""

from pathlib import Path

from mt_ckpt.families.llama import LLAMA, MISTRAL
from mt_ckpt.loaders.hf import HuggingFace


def llama_mistral(path: Path) -> HuggingFace:
    """The `hf` loader, for these two families only."""
    return HuggingFace(path, {family.model_type: family for family in (LLAMA, MISTRAL)})
