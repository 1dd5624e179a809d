"""GPT samples with the middle of documents moved to their end (docs/specs/data.md §5.8)."""
