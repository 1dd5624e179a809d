"""Between the weights a module computes with (fused, padded, cut over ranks) and canonical names (whole, one tensor for
each projection).

`fusion` is the whole mapping of one rank's part; it works for any tensor shaped like a parameter, so optimizer moments
travel the same way. Nothing is rounded: a round trip is bit-exact.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mt_core.errors import Problem, raise_if
from mt_core.parallel.tensor.plan import Column, Expert, Row, Rule, Vocab, cut_dim
from mt_models.config import TransformerConfig
from mt_models.plan import rule_of
from mt_models.qkv_layout import fuse_kv, fuse_qkv, split_kv, split_qkv

Box = tuple[slice, ...]
"""The part of a canonical tensor that one rank holds; dims that are not named are whole."""


@dataclass(frozen=True, slots=True)
class Fusion:
    """How one parameter, as one of `size` ranks of the axis that cuts it holds it, is made of boxes of canonical ones.

    Experts are cut over the expert axis, everything else over the tensor axis.
    """

    boxes: dict[str, Box]
    split: Callable[[Tensor], Sequence[Tensor]]
    """The contents of the boxes from a parameter-shaped tensor, in their order; they may share its memory."""
    fuse: Callable[[Sequence[Tensor]], Tensor]
    """The reverse."""


def fusion(config: TransformerConfig, name: str, rank: int = 0, size: int = 1) -> Fusion:
    """The fusion of the parameter called `name` on rank `rank` of `size` of its axis."""
    stem, _, leaf = name.rpartition(".")
    parent, _, module = stem.rpartition(".")
    K, rule = config.attention.head_size, rule_of(config, stem, size)
    shapes = config.canonical_shapes()

    def box(canonical: str) -> Box:
        return _box(config, rule, leaf, shapes[canonical], rank, size)

    def group_boxes(parts: str) -> dict[str, Box]:
        copies = config.attention.group_copies(size)
        names = {f"{parent}.{part}.{leaf}": 1 if part == "q" else copies for part in parts}
        return {name: _box_of(shapes[name][0], rank // n, size // n) for name, n in names.items()}

    match module, leaf:
        case "qkv", _:  # [G, R+2, K, …]
            return Fusion(group_boxes("qkv"), split_qkv, lambda xs: fuse_qkv(*xs, head_size=K))
        case "kv", _:  # [G, 2, K, …]
            return Fusion(group_boxes("kv"), split_kv, lambda xs: fuse_kv(*xs, head_size=K))
        case "q", _:  # [H, K, …]
            return Fusion({name: box(name)}, lambda x: [x.flatten(0, 1)], lambda xs: xs[0].unflatten(0, (-1, K)))
        case "gate_up", _:  # [2, F, …], or of experts [E, 2, F, D]
            dim = 1 if parent.endswith("experts") else 0
            boxes = {(part := f"{parent}.{half}.{leaf}"): box(part) for half in ("gate", "up")}
            return Fusion(boxes, lambda x: x.unbind(dim), lambda xs: torch.stack([*xs], dim=dim))
        case "out", "weight":  # [D, H, K]
            return Fusion({name: box(name)}, lambda x: [x.flatten(1)], lambda xs: xs[0].unflatten(1, (-1, K)))
        case "relative", _:  # [buckets, H]
            return Fusion({name: (slice(None), *_box_of(shapes[name][1], rank, size))}, lambda x: [x], lambda xs: xs[0])
        case (("embed" | "head"), _):  # rows beyond the vocabulary are zero
            rows = config.vocab_rows(size) // size
            valid = box(name)[0].stop - box(name)[0].start
            padding = (*(0, 0) * (len(shapes[name]) - 1), 0, rows - valid)
            return Fusion({name: box(name)}, lambda x: [x[:valid]], lambda xs: F.pad(xs[0], padding))
        case _:
            return Fusion({name: box(name)}, lambda x: [x], lambda xs: xs[0])


def _box(config: TransformerConfig, rule: Rule, leaf: str, shape: tuple[int, ...], rank: int, size: int) -> Box:
    """This rank's part of a canonical tensor, outputs first and inputs second, of a module under a rule."""
    match rule, cut_dim(rule, leaf):
        case Vocab(), _:
            rows = config.vocab_rows(size) // size
            return (slice(*(min(edge, config.vocab_size) for edge in (rank * rows, (rank + 1) * rows))),)
        case ((Column() | Expert()), _):
            return _box_of(shape[0], rank, size)
        case Row(), int():
            return slice(None), *_box_of(shape[1], rank, size)
    return ()


def _box_of(length: int, rank: int, size: int) -> Box:
    return (slice(length // size * rank, length // size * (rank + 1)),)


def to_canonical(
    config: TransformerConfig, name: str, tensor: Tensor, rank: int = 0, size: int = 1
) -> Iterator[tuple[str, Tensor]]:
    """Canonical names and what their boxes hold, of a tensor shaped like parameter `name`; memory may be shared."""
    parts = fusion(config, name, rank, size)
    yield from zip(parts.boxes, parts.split(tensor), strict=True)


def from_canonical(
    config: TransformerConfig, name: str, get: Callable[[str], Any], rank: int = 0, size: int = 1
) -> Tensor:
    """A tensor shaped like parameter `name` from whole canonical tensors, of which only the boxes are read.

    Padding rows are zero.
    """
    parts = fusion(config, name, rank, size)
    return parts.fuse([get(part)[box or ...] for part, box in parts.boxes.items()])


@torch.no_grad()
def load_canonical(model: Any, get: Callable[[str], Tensor]) -> None:
    """Fill every parameter of a whole model from the canonical tensors that `get` returns; each is asked for once."""
    for name, parameter in model.named_parameters():
        tensor = model.from_canonical(name, get)
        assert tensor.shape == parameter.shape, f"{name}: {tuple(tensor.shape)} is not {tuple(parameter.shape)}"
        parameter.copy_(tensor)


def canonical_state(model: Any) -> dict[str, Tensor]:
    """Every canonical tensor of a model, detached; they may share the parameters' memory."""
    parameters = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    return dict(pair for name, tensor in parameters for pair in model.to_canonical(name, tensor))


@torch.no_grad()
def load_stream(model: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Fill every parameter from a stream in any order; a fused one is copied as soon as its last part has come.

    `MtError` names everything missing, unexpected, repeated or misshapen at once; the model is then partly filled.
    """
    expected = model.config.canonical_shapes()
    parameters = dict(model.named_parameters())
    owners = {part: name for name in parameters for part in fusion(model.config, name).boxes}
    waiting: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    arrived: list[tuple[str, tuple[int, ...]]] = []
    for part, tensor in tensors:
        arrived.append((part, tuple(tensor.shape)))
        if expected.get(part) != arrived[-1][1] or owners[part] not in waiting:
            continue
        name = owners[part]
        waiting[name][part] = tensor
        if len(waiting[name]) == len(fusion(model.config, name).boxes):
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
