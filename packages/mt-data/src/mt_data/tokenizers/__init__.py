"""Tokenizers: components of kind `tokenizer`, and how they are built, saved and read again."""

from mt_data.tokenizers.build import build_tokenizer, load_tokenizer
from mt_data.tokenizers.saved import fingerprint

__all__ = ["build_tokenizer", "fingerprint", "load_tokenizer"]
