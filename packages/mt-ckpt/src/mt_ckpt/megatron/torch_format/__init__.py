"""Megatron's `torch` format: a file of torch.save for each model-parallel rank."""
