"""Every tensor of a checkpoint is accounted for exactly once; whatever is wrong with the set is told together."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mt_core.errors import MtError, Problem, raise_if
from mt_models.canonical import stream_problems

EMBED, HEAD = "embed.weight", "head.weight"

Shape = tuple[int, ...]


def set_problems(where: str, expected: Mapping[str, Shape], found: Iterable[tuple[str, Shape]]) -> Iterator[Problem]:
    """Missing, unexpected, repeated and misshapen tensors of the checkpoint `where`."""
    for problem in stream_problems(dict(expected), list(found)):
        yield replace(problem, where=f"{where}: {problem.where}")


def accounted(
    where: str, expected: Mapping[str, Shape], tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Pass tensors on, and raise at the end if they were not exactly the expected set; after a problem, pass none."""
    found: list[tuple[str, Shape]] = []
    open_names, right = dict(expected), True
    for name, tensor in tensors:
        found.append((name, tuple(tensor.shape)))
        right = right and open_names.pop(name, None) == found[-1][1]
        if right:
            yield name, tensor
        del tensor  # or it would be in memory while the next one is made
    raise_if(set_problems(where, expected, found))


def without_tied_head(where: str, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Drop a tied model's copy of the embedding; one that differs from the embedding is refused."""
    held: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name in (EMBED, HEAD):
            held[name] = tensor
            if len(held) == 2 and not torch.equal(held[EMBED], held[HEAD]):
                found = "the output layer's weight differs from the embedding, to which the configuration ties it"
                raise MtError(where, found, "set tie_word_embeddings to false if the model was trained untied")
        if name != HEAD:
            yield name, tensor
