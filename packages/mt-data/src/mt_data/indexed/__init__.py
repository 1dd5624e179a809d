"""The `.bin`/`.idx` pair: token ids on disk, byte-compatible with Megatron's (spec/data.md §1)."""
