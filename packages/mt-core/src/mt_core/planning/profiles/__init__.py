"""Measured figures of GPUs, one TOML file each; read by `mt_core.planning.gpu_profile`."""
