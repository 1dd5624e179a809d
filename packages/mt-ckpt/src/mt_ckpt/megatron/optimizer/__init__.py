"""The ways Megatron stores an optimizer's state, each in a file under Megatron's own name for it."""

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")
KINDS = (MASTER, *MOMENTS)
"""Tensors that an optimizer has of every parameter."""
