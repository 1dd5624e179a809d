"""Which samples a data-parallel rank reads, and how many make a step (docs/specs/data.md §6)."""
