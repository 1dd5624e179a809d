"""The native checkpoint format: PyTorch distributed checkpoint of canonical names, stored as safetensors."""
