"""T5 samples: runs of words moved from the text of the encoder to that of the decoder (docs/specs/data.md §5.3)."""
