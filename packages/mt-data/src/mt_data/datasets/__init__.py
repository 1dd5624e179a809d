"""One dataset for each kind of data section: samples as arrays, in Megatron's order (docs/specs/data.md §4 and §5)."""
