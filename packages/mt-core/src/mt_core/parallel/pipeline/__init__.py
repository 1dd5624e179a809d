"""Pipelines on ranks: a model cut into stages, messages between ranks, and what runs a schedule."""
