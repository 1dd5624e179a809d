"""Random numbers that depend on the run's seed and on the step and rank, or the sample, alone: a checkpoint carries no
RNG state."""

import hashlib

import torch


def derived_seed(seed: int, *names: object) -> int:
    """A 63-bit seed for a purpose, by hashing."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def make_sample_keys(seed: int, first: int, count: int) -> torch.Tensor:
    """What the dropout of samples depends on, int32 [count]: a hash of the seed and of each sample's number in the
    run, from `first` on."""
    hashes = [derived_seed(seed, "dropout", first + sample) & 0xFFFFFFFF for sample in range(count)]
    return torch.tensor([value - 2**31 for value in hashes], dtype=torch.int32)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators for one step of one rank; a resumed run draws what an unbroken one draws."""
    torch.manual_seed(derived_seed(seed, "step", step, rank))
