"""Parallelism, applied to a model from outside: one room for each kind, and which layouts are possible."""
