"""lm-evaluation-harness on checkpoints of mt."""
