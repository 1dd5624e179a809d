"""The `.bin`/`.idx` pair: token ids on disk, byte-compatible with Megatron's (docs/specs/data.md §1)."""
