"""Tokenizers, preprocessing, Megatron-compatible indexed datasets and samplers. Imports no torch."""
