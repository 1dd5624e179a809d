"""`torch.randperm` on the CPU, without torch: Fisher-Yates with the raw draws of MT19937 (docs/specs/data.md §6.2)."""

import numpy as np

from mt_core.errors import MtError

LIMIT = 2**32 // 20
"""From this many elements on, torch draws otherwise."""


def randperm(count: int, seed: int) -> list[int]:
    """The permutation of `range(count)` that a torch generator of this seed draws first.

    At step i elements i and i + draw mod (count − i) change places. A Python loop: 0.5 s a million.
    """
    if count >= LIMIT:
        raise MtError("data", f"{count} samples to shuffle at once", f'less than {LIMIT} a rank, or the order "single"')
    generator = np.random.MT19937()
    generator._legacy_seeding(seed)  # pyright: ignore[reportAttributeAccessIssue] - as RandomState(seed) and torch
    places = np.arange(max(count - 1, 0))
    chosen = generator.random_raw(len(places)).astype(np.int64) % (count - places) + places
    order = list(range(count))
    for place, other in enumerate(chosen.tolist()):
        order[place], order[other] = order[other], order[place]
    return order
