"""A training state in canonical names, as readers give it and writers take it. Tensors come one at a time.

What is no tensor is in Megatron's own words, since two of the three formats use them: its arguments, its scheduler's
settings and its parameter groups.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mt_ckpt.megatron.optimizer import MASTER
from mt_ckpt.megatron.parameters.table import is_buffer
from mt_ckpt.tensor_streams.streams import check_stream
from mt_core.errors import Problem, raise_if
from mt_models.config import TransformerConfig

Stream = Callable[[], Iterator[tuple[str, Tensor]]]
"""Canonical names and whole tensors, from the beginning at each call."""
Values = Mapping[str, Any]


@dataclass(frozen=True)
class RandomStates:
    """What Megatron's ranks saved of their random generators; of use under the same layout only."""

    tensor: int
    pipeline: int
    states: Mapping[tuple[int, int], Any]
    """(stage, rank of it) → the list of its generators (docs/specs/checkpoints.md §1.3).

    `torch_dist` files hold those of the first expert rank alone.
    """


@dataclass(frozen=True)
class TrainingState:
    """Everything that a run goes on from."""

    source: Path
    config: TransformerConfig
    weights: Stream
    optimizer: Mapping[str, Stream]
    """A stream for every kind in KINDS, without what is no parameter; all tensors are fp32."""
    iteration: int
    samples: int
    tokens: int | None
    """None where the format does not count them."""
    optimizer_steps: int
    args: Values
    """Megatron's arguments as plain values."""
    scheduler: Values
    """max_lr, lr_warmup_steps, … (docs/specs/checkpoints.md §1.3); counted in samples."""
    groups: Sequence[Values]
    """Settings of the parameter groups, without parameters; those of experts are the same."""
    grad_scaler: Values | None = None
    random: RandomStates | None = None
    flops: float = 0
    tokenizer_files: Sequence[Path] = ()
    lost: Sequence[str] = field(default_factory=tuple)
    """What the reader found and cannot give on, in words."""


def stream_checked(state: TrainingState, kind: str) -> Iterator[tuple[str, Tensor]]:
    """The weights ("model") or a kind of the optimizer's tensors; `MtError` if not all come, or masters do not fit."""
    shapes = state.config.canonical_shapes()
    if kind != "model":
        shapes = {name: shape for name, shape in shapes.items() if not is_buffer(name)}
    streams = {"model": state.weights, **state.optimizer, MASTER: lambda: matching_masters(state)}
    return check_stream(f"{state.source}: {kind}", shapes, streams[kind]())


def drop_buffers(weights: Stream) -> Stream:
    """The weights that an optimizer keeps masters of, as its stream of them."""
    return lambda: ((name, tensor) for name, tensor in weights() if not is_buffer(name))


def matching_masters(state: TrainingState) -> Iterator[tuple[str, Tensor]]:
    """Master weights, each compared with the weight that was rounded from it; `MtError` names all that differ.

    This also shows a vector of an optimizer that is read by a wrong layout.
    """
    weights = _by_name(state.weights())
    wrong = []
    for name, master in state.optimizer[MASTER]():
        weight = weights(name)
        if not master.to(weight.dtype).equal(weight):
            wrong.append(name)
        yield name, master
    raise_if(
        Problem(f"{state.source}: {name}", "its fp32 master does not round to the weight", "use another iteration")
        for name in wrong
    )


def _by_name(stream: Iterator[tuple[str, Tensor]]) -> Callable[[str], Tensor]:
    """Tensors of a stream by name; those that come earlier than they are asked for wait."""
    waiting: dict[str, Tensor] = {}

    def get(name: str) -> Tensor:
        while name not in waiting:
            next_name, tensor = next(stream)
            waiting[next_name] = tensor
        return waiting.pop(name)

    return get
