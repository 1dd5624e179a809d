"""Checkpoint formats, loaders, savers and conversion."""
