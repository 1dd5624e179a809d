"""Hugging Face model families that GPT can be: one file of tables each."""

from mt_ckpt.families.family import Family
from mt_ckpt.families.gpt2 import GPT2
from mt_ckpt.families.llama import LLAMA, MISTRAL

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL, GPT2)}
"""By config.json's model_type, in the order in which the `hf` saver tries them."""
