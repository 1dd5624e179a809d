"""Whose the blocks of a KV cache are: taken, shared by a prefix, given back, and used again.

A block that is full of tokens is registered under its tokens and those of the block before it. A request whose prompt
begins with the same tokens takes the block as it is. Blocks that nobody has stay registered until they are needed for
something else, the longest unused first. Names of prefixes are compared whole, so no hash can be mistaken for another.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Prefix = int
"""The number of a registered block's whole prefix; `ROOT` before the first block."""
ROOT: Prefix = 0


@dataclass(eq=False, slots=True)
class Reservation:
    """What one request may have of a pool, whatever others do; its sequences have the blocks."""

    limit: int
    """Most blocks that all of its sequences have at a time, each block counted once."""
    keeps: bool
    """Whether it gives no block back before it ends."""
    sequences: int = 1
    """How many sequences it has; it ends with the last."""
    uses: Counter[int] = field(default_factory=Counter[int])
    """How many of its sequences have each block."""


class BlockPool:
    """Blocks 1 to `blocks`; block 0 is nobody's and stays empty, for tables that are padded.

    What is reserved is never more than there is, so no request lacks a block halfway. Two requests that share a block
    need one less together only if both keep it: one that leaves it needs another, and none has become free.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        self.blocks, self.block_size = blocks, block_size
        self._reserved = 0
        """The sum of all limits."""
        self._saved = 0
        """Blocks that reservations need less together than each alone."""
        self._owners = [0] * (blocks + 1)
        """How many reservations have each block."""
        self._keepers = [0] * (blocks + 1)
        """How many of these keep it."""
        self._empty = list(range(blocks, 0, -1))
        self._unused: OrderedDict[int, None] = OrderedDict()
        self._registered: dict[tuple[Prefix, tuple[int, ...]], tuple[Prefix, int]] = {}
        self._keys: dict[int, tuple[Prefix, tuple[int, ...]]] = {}
        self._last_prefix = ROOT

    @property
    def free(self) -> int:
        """Blocks that have no owner, those that are registered included."""
        return len(self._empty) + len(self._unused)

    @property
    def available(self) -> int:
        """Blocks that are not reserved, whether they have been taken yet or not."""
        return self.blocks - self._reserved + self._saved

    def reserve(self, limit: int, shared: Sequence[int], *, keeps: bool) -> Reservation | None:
        """Reserve up to `limit` blocks, registered ones that are `shared` first; None if others may need them."""
        saved = sum(self._keepers[block] > 0 for block in shared) if keeps else 0
        if self.available < limit - saved:
            return None
        self._reserved += limit
        reservation = Reservation(limit, keeps)
        self.share(shared, reservation)
        return reservation

    def end(self, reservation: Reservation) -> None:
        """End a reservation that has given all its blocks back."""
        assert not reservation.uses, "a reservation ends without blocks"
        self._reserved -= reservation.limit

    def take(self, reservation: Reservation) -> int:
        """A block without another owner; the longest unused is forgotten if none is empty."""
        assert len(reservation.uses) < reservation.limit, "no request has more than it has reserved"
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._unused.popitem(last=False)
            del self._registered[self._keys.pop(block)]
        self.share([block], reservation)
        return block

    def share(self, blocks: Iterable[int], reservation: Reservation) -> None:
        """Count one more sequence of a reservation for each of these blocks."""
        for block in blocks:
            reservation.uses[block] += 1
            if reservation.uses[block] > 1:
                continue
            self._unused.pop(block, None)
            self._owners[block] += 1
            if reservation.keeps:
                self._saved += self._keepers[block] > 0
                self._keepers[block] += 1

    def release(self, blocks: Sequence[int], reservation: Reservation) -> None:
        """Count one sequence less for each of these blocks; the first ones of a sequence are reusable the longest."""
        for block in reversed(blocks):
            assert reservation.uses[block] > 0, "a block has an owner until it is released"
            reservation.uses[block] -= 1
            if reservation.uses[block]:
                continue
            del reservation.uses[block]
            self._owners[block] -= 1
            if reservation.keeps:
                self._keepers[block] -= 1
                self._saved -= self._keepers[block] > 0
            if self._owners[block]:
                continue
            if block in self._keys:
                self._unused[block] = None
            else:
                self._empty.append(block)

    def register(self, before: Prefix, tokens: Sequence[int], block: int) -> Prefix:
        """Offer a full block to others, unless another with the same prefix is offered; the number of its prefix."""
        key = (before, tuple(tokens))
        if key not in self._registered:
            self._last_prefix += 1
            self._registered[key] = self._last_prefix, block
            self._keys[block] = key
        return self._registered[key][0]

    def find_prefix(self, tokens: Sequence[int], most: int) -> list[tuple[Prefix, int]]:
        """The registered blocks that a sequence begins with, at most so many, each with the number of its prefix."""
        result: list[tuple[Prefix, int]] = []
        before, size = ROOT, self.block_size
        while len(result) < most:
            key = before, tuple(tokens[len(result) * size : (len(result) + 1) * size])
            if key not in self._registered:
                break
            result.append(self._registered[key])
            before = result[-1][0]
        return result
