"""Megatron-Core's checkpoints: `torch` (a pickle for each model-parallel rank) and `torch_dist` (chunks).

docs/specs/checkpoints.md describes both formats.
"""
