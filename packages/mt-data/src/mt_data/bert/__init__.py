"""BERT samples: two parts of a document with hidden words (docs/specs/data.md §5.2)."""
