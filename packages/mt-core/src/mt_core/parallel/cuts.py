"""How ranks divide a model, as its configuration declares it: slices of canonical tensors, and sizes. Torch-free."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class TensorCut:
    """How the ranks of an axis divide one canonical tensor: each has an equal slice along a dim.

    Experts are cut a second time where tensor ranks share each: rank r of the axis then is expert rank r // t and
    tensor rank r % t.
    """

    dim: int
    axis: Literal["tensor", "expert"] = "tensor"
    parts: int | None = None
    """The number of different slices if that is limited; ranks beyond it repeat them, as for key/value heads."""
    divisor: int | None = None
    """The slices are padded to a multiple of this, as rows of a vocabulary are; the last ones may be padding alone."""
    inner_dim: int | None = None
    """The dim that tensor ranks divide, if they share each expert."""

    def local_length(self, length: int, ranks: int) -> int:
        """The length on each of so many ranks, padding included."""
        if self.divisor is not None:
            return -(-length // (self.divisor * ranks)) * self.divisor
        return length // min(ranks, self.parts or ranks)

    def local_slice(self, length: int, rank: int, ranks: int) -> slice:
        """The slice of the whole tensor that a rank has, without padding."""
        size, repeats = self.local_length(length, ranks), ranks // min(ranks, self.parts or ranks)
        start = rank // repeats * size
        return slice(min(start, length), min(start + size, length))


@dataclass(frozen=True, slots=True)
class CutSize:
    """A size of a model that the ranks of an axis divide, and that limits how many they can be."""

    name: str
    """Key of the size in the configuration, such as "model.attention.heads"."""
    size: int
    axis: Literal["tensor", "expert", "expert_tensor"] = "tensor"
    repeats: bool = False
    """Whether a multiple of it of ranks is possible too: several then have the same slice, as of key/value heads."""
    all_to_all: bool = False
    """Whether context ranks that exchange by all-to-all divide it further."""

    def fits(self, ranks: int) -> bool:
        """Whether so many ranks can divide it."""
        return self.size % ranks == 0 or (self.repeats and ranks % self.size == 0)

    def local(self, ranks: int) -> int:
        """The size on each of so many ranks."""
        return max(self.size // ranks, int(self.repeats))
