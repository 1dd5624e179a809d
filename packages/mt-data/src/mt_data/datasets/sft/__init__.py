"""Packed conversations for supervised fine-tuning (docs/specs/data.md §5.7)."""
