"""Megatron's name for the loader of Hugging Face Mixtral models."""

from pathlib import Path

from mt_ckpt.huggingface.families.moe import MIXTRAL
from mt_ckpt.huggingface.loader import HuggingFace


def mixtral_hf(path: Path) -> HuggingFace:
    """The `hf` loader, for this family only."""
    return HuggingFace(path, {MIXTRAL.model_type: MIXTRAL})
