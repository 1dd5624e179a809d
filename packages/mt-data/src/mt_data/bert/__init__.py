"""BERT samples: two parts of a document with hidden words (spec/data.md §5.2)."""
