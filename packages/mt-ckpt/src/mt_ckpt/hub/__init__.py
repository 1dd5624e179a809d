"""Checkpoints on the Hugging Face hub: fetched into the cache, copied out of it, published."""
