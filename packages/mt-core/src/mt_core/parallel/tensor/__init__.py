"""Tensor parallelism: matrices are cut over an axis, by a plan of rules, with collectives where parts meet."""
