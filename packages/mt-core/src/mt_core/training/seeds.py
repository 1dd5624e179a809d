"""Random numbers that depend on the run's seed, the step and the rank alone, so a checkpoint carries no RNG state."""

import hashlib

import torch


def derived_seed(seed: int, *names: object) -> int:
    """A 63-bit seed for a purpose, by hashing."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators for one step of one rank; a resumed run draws what an unbroken one draws."""
    torch.manual_seed(derived_seed(seed, "step", step, rank))
