"""From crawled text to a corpus: cleaning, near-duplicates and decontamination, step by step (spec/data.md §7)."""
