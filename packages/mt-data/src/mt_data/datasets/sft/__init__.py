"""Packed conversations for supervised fine-tuning (spec/data.md §5.7)."""
