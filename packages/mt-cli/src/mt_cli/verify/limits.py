"""How far two correct runs may be apart: what rounding explains, and no more. Torch-free.

A layer rounds some 36 results, forward and backward, one after the other, and both runs do; roundings add up as a
random walk. Measured over two presets, six layouts and two seeds, the worst gradient was 10 eps apart in bf16, where
sums are taken in fp32 (12 allowed with two layers), and 40 eps in fp32, where sums over tokens round too (136 allowed).
"""

from typing import Any

EPS = {"bf16": 2.0**-7, "fp32": 2.0**-23}
"""Distance from 1 to the next number."""
ROUNDINGS = 36
"""In a row, a layer."""
FP64 = 1e-12
"""The limit of everything in fp64: thousands of roundings, and a million times less than any mistake."""


def limit(config: Any, quantity: str) -> float:
    """The largest relative difference of a quantity of `mt_core.verification.compare` that agrees."""
    dtype = config.precision.dtype
    if dtype == "fp64":
        return FP64
    walk, tokens = 2 * ROUNDINGS * config.model.layers, config.batch.global_batch * config.data.seq_length
    mean = quantity in ("loss", "grad norm")
    if dtype == "bf16":
        return EPS[dtype] * (walk / tokens if mean else walk) ** 0.5
    return EPS[dtype] * (tokens if mean else walk * tokens) ** 0.5


def compared(config: Any, quantity: str) -> bool:
    """Whether a quantity says something: in 16 bits, Adam makes whole steps of roundings, so weights do not."""
    return config.precision.dtype != "bf16" or quantity in ("loss", "grad norm") or quantity.startswith("gradient of ")
