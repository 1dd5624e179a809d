"""Tokenizers: components of kind `tokenizer`, and how they are built, saved and read again."""

from mt_data.tokenizers.build import build, load
from mt_data.tokenizers.saved import fingerprint

__all__ = ["build", "fingerprint", "load"]
