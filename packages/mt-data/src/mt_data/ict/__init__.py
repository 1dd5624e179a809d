"""Inverse cloze task: samples of a sentence and the block that it came from (spec/data.md §5.4)."""
