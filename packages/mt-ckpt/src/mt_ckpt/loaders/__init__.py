"""Loaders: a model's configuration and its canonical tensors, read from some format."""
