"""Initial weights that depend on the seed and the canonical name only: not on layout, fusion, padding, dtype or device.

Projections into the residual stream draw from N(0, init_std / sqrt(2 · layers)), A of adapters uniformly from
±1 / sqrt(inputs), where B is zero (as the library peft does), and other weights from N(0, init_std);
biases are zero, norm weights one, or zero where one is added to them (docs/specs/core.md §2.7).
"""

import hashlib
import math

import torch
from torch import Tensor

from mt_models.config import TransformerConfig

INTO_RESIDUAL = (
    *(".attn.out.weight", ".cross.out.weight"),
    *(".mlp.down.weight", ".mlp.experts.down.weight", ".mlp.shared.down.weight"),
)


def initial(config: TransformerConfig, seed: int, *, name: str, shape: tuple[int, ...]) -> Tensor:
    """The initial value of canonical tensor `name`, fp32 on the CPU."""
    offset = config.norm.kind == "rms" and config.norm.offset
    if name.endswith((".bias", ".lora_b.weight")) or (offset and name.endswith("norm.weight")):
        return torch.zeros(shape, dtype=torch.float32, device="cpu")
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.float32, device="cpu")
    if name.endswith(".lora_a.weight"):
        uniform = torch.rand(shape, generator=generator(seed, name), dtype=torch.float32, device="cpu")
        return (2 * uniform - 1) / math.sqrt(shape[1])
    layers = config.decoder_layers if config.kind == "t5" and name.startswith("decoder.") else config.layers
    std = config.init_std / (math.sqrt(2 * layers) if name.endswith(INTO_RESIDUAL) else 1.0)
    return torch.randn(shape, generator=generator(seed, name), dtype=torch.float32, device="cpu").mul_(std)


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator of its own for each seed and name, seeded by 32 bits: torch's uses no more of a seed."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))
