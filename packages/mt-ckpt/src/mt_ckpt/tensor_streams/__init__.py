"""Streams of named tensors, as loaders yield and savers take them: names, accounting, experts, files."""
