"""Experts one by one, as most formats store them, and stacked [E, …], as we do."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from mt_core.errors import MtError

ONE = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")

Shape = tuple[int, ...]


def unstack_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shapes of a model with a tensor for each expert: `experts.3.up.weight` for `experts.up.weight`[3]."""
    shapes_by_expert: dict[str, Shape] = {}
    for name, shape in shapes.items():
        stem, experts, leaf = name.partition(".experts.")
        shapes_by_expert |= (
            {f"{stem}{experts}{e}.{leaf}": shape[1:] for e in range(shape[0])} if experts else {name: shape}
        )
    return shapes_by_expert


def unstack_experts(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """A stream with each stack taken apart; the parts share its memory."""
    for name, tensor in tensors:
        stem, experts, leaf = name.partition(".experts.")
        if experts:
            yield from ((f"{stem}{experts}{number}.{leaf}", part) for number, part in enumerate(tensor))
        else:
            yield name, tensor


def stack_experts(
    where: str, tensors: Iterable[tuple[str, Tensor]], count: int, *, used: Callable[[Tensor], object]
) -> Iterator[tuple[str, Tensor]]:
    """A stream with each layer's `count` experts stacked to one tensor [E, …].

    Memory-mapped parts take no memory before their stack is complete; `used` gets each once it has been copied.
    """
    waiting: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors:
        if not (one := ONE.fullmatch(name)):
            yield name, tensor
            continue
        stack = f"{one[1]}.{one[3]}"
        parts = waiting.setdefault(stack, {})
        parts[int(one[2])] = tensor
        if len(parts) == count:
            del waiting[stack]
            yield stack, _stack(f"{where}: {stack}", [parts.pop(number) for number in range(count)], used)
    assert not waiting, f"incomplete {', '.join(waiting)}"


def _stack(where: str, parts: list[Tensor], used: Callable[[Tensor], object]) -> Tensor:
    dtypes = sorted({str(part.dtype).removeprefix("torch.") for part in parts})
    if len(dtypes) > 1:
        raise MtError(where, f"its experts are stored as {' and '.join(dtypes)}", "store them all alike")
    stack = torch.empty((len(parts), *parts[0].shape), dtype=parts[0].dtype)
    for number, part in enumerate(parts):
        stack[number] = part
        used(part)
    return stack
