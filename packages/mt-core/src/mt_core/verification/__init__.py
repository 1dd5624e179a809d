"""Proof that a layout computes what one process computes: the same run under both, number by number."""
