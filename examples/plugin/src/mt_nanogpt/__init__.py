"""An example plugin for mt: checkpoints of nanoGPT, and a command that counts parameters."""
