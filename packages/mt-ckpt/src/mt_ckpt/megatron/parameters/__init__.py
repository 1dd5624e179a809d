"""The tensors of Megatron's models: names, canonical parts, shards on tensor and expert ranks, pipeline stages."""
