"""The orders by name."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from mt_core.errors import MtError
from mt_core.plugins import did_you_mean
from mt_data.samplers.cyclic import cyclic, cyclic_unsharded
from mt_data.samplers.share import Share
from mt_data.samplers.single import sequential, single

Sampler = Callable[[int, int, Share], Iterator[Sequence[int]]]
"""From samples in the dataset, samples consumed by all ranks and this rank's share to its micro-batches."""

SAMPLERS: Mapping[str, Sampler] = {
    "single": single,
    "sequential": sequential,
    "cyclic": cyclic,
    "cyclic-unsharded": cyclic_unsharded,
}


def sampler(name: str) -> Sampler:
    """The order of a name."""
    if name not in SAMPLERS:
        raise MtError("order", f"unknown name {name!r}", did_you_mean(name, SAMPLERS))
    return SAMPLERS[name]
