"""Ranks as processes: who they are, where each is, what happens when one stops, and how they end. Torch-free."""
