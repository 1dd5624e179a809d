"""Answers about data before a run: whether an index is sound, and what a blend or a whole run draws from it."""
