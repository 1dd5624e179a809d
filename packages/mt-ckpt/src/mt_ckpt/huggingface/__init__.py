"""Hugging Face format: config.json, safetensors and the tables of its model families."""
