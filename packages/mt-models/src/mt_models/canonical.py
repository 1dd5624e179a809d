"""Between the weights a module computes with (fused, padded) and canonical names (one tensor per projection).

`fusion` is the whole mapping; it works for any tensor shaped like a parameter, so optimizer moments travel the same
way. Nothing is rounded: a round trip is bit-exact.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mt_core.errors import Problem, raise_if
from mt_models.config import GPTConfig

if TYPE_CHECKING:
    from mt_models.gpt import GPT


@dataclass(frozen=True, slots=True)
class Fusion:
    """How one parameter is made of canonical tensors."""

    names: tuple[str, ...]
    split: Callable[[Tensor], Sequence[Tensor]]
    """The canonical tensors of a parameter-shaped one, in the order of `names`; they may share its memory."""
    fuse: Callable[[Sequence[Tensor]], Tensor]
    """The reverse."""


def fusion(config: GPTConfig, name: str) -> Fusion:
    """The fusion of the parameter called `name`, such as `layers.0.attn.qkv.weight`."""
    stem, _, leaf = name.rpartition(".")
    parent, _, module = stem.rpartition(".")
    match module, leaf:
        case "qkv", _:  # [G, R+2, K, …]
            G, K, counts = config.attention.kv_groups, config.attention.head_size, (config.queries_per_group, 1, 1)
            return Fusion(
                tuple(f"{parent}.{projection}.{leaf}" for projection in "qkv"),
                lambda x: [part.flatten(0, 2) for part in x.split(counts, dim=1)],
                lambda xs: torch.cat([x.unflatten(0, (G, n, K)) for x, n in zip(xs, counts, strict=True)], dim=1),
            )
        case "gate_up", _:  # [2, F, …]
            return Fusion((f"{parent}.gate.{leaf}", f"{parent}.up.{leaf}"), torch.unbind, lambda xs: torch.stack([*xs]))
        case "out", "weight":  # [D, H, K]
            heads = (config.attention.heads, config.attention.head_size)
            return Fusion((name,), lambda x: [x.flatten(1)], lambda xs: xs[0].unflatten(1, heads))
        case (("embed" | "head"), _):  # rows beyond the vocabulary are zero
            rows, padding = config.vocab_size, config.padded_vocab_size - config.vocab_size
            return Fusion((name,), lambda x: [x[:rows]], lambda xs: F.pad(xs[0], (0, 0, 0, padding)))
        case _:
            return Fusion((name,), lambda x: [x], lambda xs: xs[0])


def to_canonical(config: GPTConfig, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Canonical names and tensors of a tensor shaped like parameter `name`; they may share its memory."""
    parts = fusion(config, name)
    yield from zip(parts.names, parts.split(tensor), strict=True)


def from_canonical(config: GPTConfig, name: str, get: Callable[[str], Tensor]) -> Tensor:
    """A tensor shaped like parameter `name` from canonical ones; padding rows are zero."""
    parts = fusion(config, name)
    return parts.fuse([get(part) for part in parts.names])


@torch.no_grad()
def load_canonical(model: "GPT", get: Callable[[str], Tensor]) -> None:
    """Fill every parameter from the canonical tensors that `get` returns; each is asked for exactly once."""
    for name, parameter in model.named_parameters():
        tensor = model.from_canonical(name, get)
        assert tensor.shape == parameter.shape, f"{name}: {tuple(tensor.shape)} is not {tuple(parameter.shape)}"
        parameter.copy_(tensor)


def canonical_state(model: "GPT") -> dict[str, Tensor]:
    """Every canonical tensor of a model, detached; they may share the parameters' memory."""
    parameters = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    return dict(pair for name, tensor in parameters for pair in model.to_canonical(name, tensor))


@torch.no_grad()
def load_stream(model: "GPT", tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Fill every parameter from a stream in any order; a fused one is copied as soon as its last part has come.

    `MtError` names everything missing, unexpected, repeated or misshapen at once; the model is then partly filled.
    """
    expected = model.config.canonical_shapes()
    parameters = dict(model.named_parameters())
    owners = {part: name for name in parameters for part in fusion(model.config, name).names}
    waiting: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    arrived: list[tuple[str, tuple[int, ...]]] = []
    for part, tensor in tensors:
        arrived.append((part, tuple(tensor.shape)))
        if expected.get(part) != arrived[-1][1] or owners[part] not in waiting:
            continue
        name = owners[part]
        waiting[name][part] = tensor
        if len(waiting[name]) == len(fusion(model.config, name).names):
            parameters[name].copy_(model.from_canonical(name, waiting.pop(name).__getitem__))
    raise_if(stream_problems(expected, arrived))


def stream_problems(
    expected: dict[str, tuple[int, ...]], arrived: Sequence[tuple[str, tuple[int, ...]]]
) -> Iterator[Problem]:
    """What is wrong with a stream of names and shapes, against those a model needs."""
    counts = Counter(name for name, _ in arrived)
    yield from (
        Problem(name, "tensor is missing", f"shape {shape}") for name, shape in expected.items() if not counts[name]
    )
    for name, shape in dict(arrived).items():
        if name not in expected:
            yield Problem(name, f"unexpected tensor of shape {shape}", "the model has no tensor of this name")
        elif shape != expected[name]:
            yield Problem(name, f"tensor has shape {shape}", f"the model needs {expected[name]}")
        if counts[name] > 1:
            yield Problem(name, f"tensor comes {counts[name]} times", "once is right")
