"""`mt data preprocess`: loose JSON lines to `.bin`/`.idx` pairs, in constant memory (spec/data.md §2)."""
