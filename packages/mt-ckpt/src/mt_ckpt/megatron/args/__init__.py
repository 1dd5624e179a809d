"""Megatron's `args` of a model: read to a configuration, written from one, and refused where mt lacks what they ask."""
