"""One dataset for each kind of data section: samples as arrays, in Megatron's order (spec/data.md §4 and §5)."""
