"""GPT samples with the middle of documents moved to their end (spec/data.md §5.8)."""
