"""Training new tokenizers: byte-level BPE, BERT's WordPiece, and SentencePiece models for T5 and for Llama."""
