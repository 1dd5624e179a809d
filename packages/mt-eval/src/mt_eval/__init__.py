"""Evaluation tasks and text generation."""
