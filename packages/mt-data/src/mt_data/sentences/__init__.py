"""Samples of whole sentences of one document: the mapping that BERT, T5 and ICT share (docs/specs/data.md §5.1.1)."""
