"""Detoxification by self-generation: a model's own texts, scored, filtered, trained on, and what came of it."""
