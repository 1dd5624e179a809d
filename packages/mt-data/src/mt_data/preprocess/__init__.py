"""`mt data preprocess`: loose JSON lines to `.bin`/`.idx` pairs, in constant memory (docs/specs/data.md §2)."""
