"""Partial run configurations as TOML, one file for each published model; nothing here is code."""
