"""Meshes, collectives and data parallelism. Layers know nothing of it."""
