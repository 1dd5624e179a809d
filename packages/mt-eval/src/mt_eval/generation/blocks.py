"""Whose the blocks of a KV cache are: taken, shared by a prefix, given back, and used again.

A block that is full of tokens is registered under its tokens and those of the block before it. A request whose prompt
begins with the same tokens takes the block as it is. Blocks that nobody has stay registered until they are needed for
something else, the longest unused first. Names of prefixes are compared whole, so no hash can be mistaken for another.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

Prefix = int
"""The number of a registered block's whole prefix; `ROOT` before the first block."""
ROOT: Prefix = 0


class BlockPool:
    """Blocks 1 to `blocks`; block 0 is nobody's and stays empty, for tables that are padded."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.blocks, self.block_size = blocks, block_size
        self.promised = 0
        """Blocks that requests have not taken yet, but may."""
        self._owners = [0] * (blocks + 1)
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
        """Blocks that are free and promised to nobody."""
        return self.free - self.promised

    def take(self) -> int:
        """A block for one owner; the longest unused is forgotten if none is empty."""
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._unused.popitem(last=False)
            del self._registered[self._keys.pop(block)]
        self._owners[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """Add an owner to each of these blocks."""
        for block in blocks:
            self._owners[block] += 1
            self._unused.pop(block, None)

    def release(self, blocks: Sequence[int]) -> None:
        """Take an owner from each of these blocks; the first ones of a sequence are kept the longest."""
        for block in reversed(blocks):
            assert self._owners[block] > 0, "a block has an owner until it is released"
            self._owners[block] -= 1
            if self._owners[block]:
                continue
            if block in self._keys:
                self._unused[block] = None
            else:
                self._empty.append(block)

    def is_unused(self, block: int) -> bool:
        """Whether nobody has the block."""
        return self._owners[block] == 0

    def is_shared(self, block: int) -> bool:
        """Whether several have the block."""
        return self._owners[block] > 1

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
