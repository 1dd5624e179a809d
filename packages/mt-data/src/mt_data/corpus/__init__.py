"""From crawled text to a corpus: cleaning, near-duplicates and decontamination, step by step.

Source: docs/specs/data.md §7.
"""
