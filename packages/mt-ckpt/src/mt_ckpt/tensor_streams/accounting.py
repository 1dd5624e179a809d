"""Every tensor of a checkpoint is accounted for exactly once; whatever is wrong with the set is reported together."""

from collections.abc import Iterable, Iterator, Mapping
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


def drop_tied_head(where: str, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Drop a tied model's copy of the embedding; one that differs from the embedding is refused."""
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name in (EMBED, HEAD):
            weights[name] = tensor
            if len(weights) == 2 and not torch.equal(weights[EMBED], weights[HEAD]):
                problem = "the output layer's weight differs from the embedding, to which the configuration ties it"
                raise MtError(where, problem, "set tie_word_embeddings to false if the model was trained untied")
        if name != HEAD:
            yield name, tensor
