"""Megatron's `torch_dist` format: a directory of torch's distributed checkpoints, readable under any layout."""
