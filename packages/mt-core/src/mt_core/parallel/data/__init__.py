"""Data parallelism: ranks with the same weights see different tokens, and share optimizer state or weights."""
