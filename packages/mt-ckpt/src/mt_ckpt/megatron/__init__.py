"""Megatron-Core's checkpoints: `torch` (a pickle for each model-parallel rank) and `torch_dist` (chunks).

What the formats hold is described in ../shared/spec/checkpoints.md; the sections named in these files are its.
"""
