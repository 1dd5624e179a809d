"""Inverse cloze task: samples of a sentence and the block that it came from (docs/specs/data.md §5.4)."""
