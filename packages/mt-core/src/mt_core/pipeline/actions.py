"""What a rank of a pipeline does, in order: actions, where chunks of layers lie, and a schedule made of both.

The model is cut into stages, numbered as a token passes through them. Each rank has one or more of them, its chunks. A
schedule says for each rank which pass of which microbatch through which chunk comes next, and nothing about time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

PassKind = Literal["F", "B", "I", "W"]
"""Forward pass; whole backward pass; its two halves: the gradients of the input, and those of the weights."""
Shape = Literal["loop", "v"]
"""How chunks go over ranks: again and again from the first to the last, or there and back."""


@dataclass(frozen=True, slots=True)
class Action:
    """One pass of a microbatch through a chunk of the rank that does it."""

    kind: PassKind
    microbatch: int
    chunk: int = 0
    """Which of the rank's stages, counted from 0."""

    @property
    def passes(self) -> tuple["Action", ...]:
        """The passes of which it consists: itself."""
        return (self,)

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}" + (f" of chunk {self.chunk}" if self.chunk else "")


@dataclass(frozen=True, slots=True)
class Overlap:
    """A forward pass and a backward pass of two microbatches, run together so that each hides the other's waiting."""

    forward: Action
    backward: Action

    @property
    def passes(self) -> tuple[Action, ...]:
        """The passes of which it consists: both."""
        return self.forward, self.backward

    def __str__(self) -> str:
        return f"{self.forward} with {self.backward}"


Step: TypeAlias = Action | Overlap
"""What a rank does at once; one `match` executes it, as in the tests: `Action("F", microbatch, chunk)` and so on."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Which rank has which stages."""

    ranks: int
    chunks: int = 1
    """Stages of each rank."""
    shape: Shape = "loop"

    @property
    def stages(self) -> int:
        """Stages of the whole model."""
        return self.ranks * self.chunks

    def get_stage(self, rank: int, chunk: int) -> int:
        """The stage that is a rank's chunk."""
        back = self.shape == "v" and chunk % 2
        return chunk * self.ranks + (self.ranks - 1 - rank if back else rank)

    def get_rank(self, stage: int) -> int:
        """The rank that has a stage."""
        chunk, position = divmod(stage, self.ranks)
        return self.ranks - 1 - position if self.shape == "v" and chunk % 2 else position

    def get_stages(self, rank: int) -> tuple[int, ...]:
        """The stages of a rank, in the order of its chunks."""
        return tuple(self.get_stage(rank, chunk) for chunk in range(self.chunks))

    def count_sends(self, rank: int) -> tuple[int, int]:
        """Tensors that a rank sends for each microbatch: features to the next stages, gradients to those before."""
        stages = self.get_stages(rank)
        features, gradients = ([stage + step for stage in stages] for step in (1, -1))
        return self._count_elsewhere(features, rank), self._count_elsewhere(gradients, rank)

    def _count_elsewhere(self, stages: list[int], rank: int) -> int:
        """How many of these stages exist, and on another rank."""
        return sum(0 <= stage < self.stages and self.get_rank(stage) != rank for stage in stages)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Everything that all ranks do in a step, in order."""

    name: str
    placement: Placement
    microbatches: int
    steps: tuple[tuple[Step, ...], ...]
    """Each rank's list."""

    def list_passes(self, rank: int) -> Iterator[Action]:
        """The passes of a rank in order, those that overlap one after the other."""
        return (action for step in self.steps[rank] for action in step.passes)

    def in_sequence(self) -> "Schedule":
        """The schedule without passes that run together: each of them ends before the next begins, as on a GPU's one
        stream, and what it made leaves at once."""
        return replace(self, steps=tuple(tuple(self.list_passes(rank)) for rank in range(self.placement.ranks)))
