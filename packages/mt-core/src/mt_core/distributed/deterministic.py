"""Deterministic mode: two runs of the same layout compute the same numbers, bit for bit."""

import os

import torch


def deterministic(wanted: bool) -> None:
    """Choose deterministic kernels and collectives; an operation that has none raises, naming itself, when it runs.

    To be called before CUDA and NCCL start: they read their settings once.
    """
    if not wanted:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
