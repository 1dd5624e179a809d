"""Which samples a data-parallel rank reads, and how many make a step (spec/data.md §6)."""
