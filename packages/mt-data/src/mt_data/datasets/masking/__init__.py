"""Masking words of a sample, as BERT and T5 do (docs/specs/data.md §5.1)."""
