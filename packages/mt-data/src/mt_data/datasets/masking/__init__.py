"""Hiding words of a sample, as BERT and T5 do (spec/data.md §5.1)."""
