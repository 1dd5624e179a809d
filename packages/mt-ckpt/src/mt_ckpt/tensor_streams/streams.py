"""What every stream of named tensors goes through: checked against a model's tensors, read side by side, rounded.

Every tensor of a checkpoint is accounted for exactly once; whatever is wrong with the set is reported together.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mt_core.errors import MtError, Problem, raise_if
from mt_models.canonical import stream_problems

EMBED, HEAD = "embed.weight", "head.weight"

Shape = tuple[int, ...]


def set_problems(where: str, expected: Mapping[str, Shape], actual: Iterable[tuple[str, Shape]]) -> Iterator[Problem]:
    """Missing, unexpected, repeated and misshapen tensors of the checkpoint `where`."""
    for problem in stream_problems(dict(expected), list(actual)):
        yield replace(problem, where=f"{where}: {problem.where}")


def check_stream(
    where: str, expected: Mapping[str, Shape], tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Pass tensors on, and raise at the end if they were not exactly the expected set; after a problem, pass none."""
    seen: list[tuple[str, Shape]] = []
    open_names, right = dict(expected), True
    for name, tensor in tensors:
        seen.append((name, tuple(tensor.shape)))
        right = right and open_names.pop(name, None) == seen[-1][1]
        if right:
            yield name, tensor
        del tensor  # or it would be in memory while the next one is made
    raise_if(set_problems(where, expected, seen))


def merge_copies(
    where: str, tensors: Iterable[tuple[str, Tensor]], repeated: Collection[str], *, tied: bool
) -> Iterator[tuple[str, Tensor]]:
    """Pass each tensor on once, under one name; copies that differ from the first are refused.

    `repeated` are the names that come more than once. A tied model's output layer is the embedding, whichever of the
    two a file has.
    """
    first: dict[str, tuple[str, Tensor]] = {}
    for stored, tensor in tensors:
        name = name_tied(stored, tied=tied)
        if name not in first:
            yield name, tensor
        elif not bitwise_equal(first[name][1], tensor):
            raise _copies_differ(where, stored, first[name][0])
        if name in repeated:
            first.setdefault(name, (stored, tensor))


def bitwise_equal(tensor: Tensor, other: Tensor) -> bool:
    """Whether tensors are alike in type, shape and every bit: unlike torch.equal, also where they are NaN."""
    if tensor is other:
        return True
    if tensor.dtype != other.dtype or tensor.shape != other.shape:
        return False
    return torch.equal(*(one.contiguous().view(-1).view(torch.uint8) for one in (tensor, other)))


def name_tied(name: str, *, tied: bool) -> str:
    """The name of a tensor in a model, whose output layer is the embedding if it is tied."""
    return EMBED if tied and name == HEAD else name


def _copies_differ(where: str, name: str, first: str) -> MtError:
    if name == first:
        return MtError(f"{where}: {name}", "is stored twice, and differently", "save the model again")
    problem = "the output layer's weight differs from the embedding, to which the configuration ties it"
    return MtError(where, problem, "set tie_word_embeddings to false if the model was trained untied")


def align_streams(streams: Sequence[Iterable[tuple[str, Tensor]]]) -> Iterator[tuple[str, tuple[Tensor | None, ...]]]:
    """Each name with its tensor from every stream, None where a stream has none; those come last.

    A tensor whose mates have not come waits in its memory map, unread, so one name at a time is in memory.
    """
    running = dict(enumerate(map(iter, streams)))
    waiting: dict[str, dict[int, Tensor]] = {}
    while running:
        for number, stream in list(running.items()):
            if (pair := next(stream, None)) is None:
                del running[number]
                continue
            name, tensor = pair
            waiting.setdefault(name, {})[number] = tensor
            if len(waiting[name]) == len(streams):
                tensors = waiting.pop(name)
                yield name, tuple(tensors[i] for i in range(len(streams)))
    for name, tensors in waiting.items():
        yield name, tuple(tensors.get(i) for i in range(len(streams)))


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_dtype(name: str) -> torch.dtype:
    """The dtype for fp32, bf16 or fp16."""
    if name not in DTYPES:
        raise MtError("--dtype", f"unknown name {name!r}", f"allowed: {', '.join(DTYPES)}")
    return DTYPES[name]


def cast(where: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` rounded to `dtype`; a value that would become infinite is refused."""
    rounded = tensor.to(dtype)
    if tensor.dtype != dtype and torch.isinf(rounded).any() and not torch.isinf(tensor).any():
        largest = tensor.abs().max().item()
        raise MtError(where, f"{largest:g} does not fit {str(dtype).removeprefix('torch.')}", "use bf16 or fp32")
    return rounded
