"""Which rank writes which tensor, so that all ranks write about as many bytes."""

from collections.abc import Callable, Mapping, Sequence


def choose_owners(nbytes: Mapping[str, int], candidates: Callable[[str], Sequence[int]]) -> dict[str, int]:
    """Tensor name → rank: the largest first, each to the candidate that has the fewest bytes so far.

    `candidates(name)` are the ranks that can gather the tensor. Every rank computes the same table from the same input.
    """
    loads: dict[int, int] = {}
    owners: dict[str, int] = {}
    for name in sorted(nbytes, key=lambda name: (-nbytes[name], name)):
        owner = min(candidates(name), key=lambda rank: (loads.get(rank, 0), rank))
        loads[owner] = loads.get(owner, 0) + nbytes[name]
        owners[name] = owner
    return owners
