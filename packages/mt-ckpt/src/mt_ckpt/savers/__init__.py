"""Savers: a model's configuration and canonical tensors, written in some format."""
