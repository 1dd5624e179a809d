"""Between the weights a module computes with (fused, padded, cut over ranks) and canonical names (whole, one tensor for
each projection).

A layer's `fusions` define how its parameters are made of canonical tensors, the configuration's `canonical_cuts` which
part of those a rank has. Any tensor shaped like a parameter can be converted, so optimizer moments are as well. Nothing
is rounded: a round trip is bit-exact.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mt_core.contracts import CanonicalModel, Model, as_module
from mt_core.errors import Problem, raise_if
from mt_core.parallel.cuts import TensorCut
from mt_models.config.task_head import HEAD_MODULES
from mt_models.config.tensors import CanonicalTensor, Tensors
from mt_models.fusion import Fusion, get_fusion

RankPosition = tuple[int, int, int]
"""A rank of the axis that cuts a parameter, the size of the axis, and the tensor ranks that share each expert in it."""
WHOLE: RankPosition = (0, 1, 1)
"""The only rank of an axis."""
TensorRegion = tuple[slice, ...]
"""The part of a canonical tensor that one rank holds; dims that are not named are whole."""


def canonical_regions(
    model: nn.Module, tensors: Tensors, name: str, position: RankPosition = WHOLE
) -> dict[str, TensorRegion]:
    """Canonical names that parameter `name` holds on a rank of the axis that cuts it, and their regions.

    `tensors` are all of the model's. Experts are cut over the expert axis, times the tensor axis if that shares each;
    everything else is cut over the tensor axis.
    """
    parts = _parts(get_fusion(model, name), name)
    return {part: _region(tensors[part], position) for part in parts}


def list_stored(model: CanonicalModel) -> Iterator[tuple[str, Tensor]]:
    """What checkpoints have of a model in memory: every parameter, and the buffers with a canonical name."""
    yield from model.named_parameters()
    shapes = model.config.canonical_shapes()
    yield from ((name, buffer) for name, buffer in as_module(model).named_buffers() if name in shapes)


def _parts(fusion: Fusion, name: str) -> list[str]:
    """The canonical names of a parameter's parts."""
    if fusion.parts is None:
        return [name]
    *parents, _, leaf = name.split(".")
    return [".".join((*parents, part, leaf)) for part in fusion.parts]


def _region(tensor: CanonicalTensor, position: RankPosition) -> TensorRegion:
    (rank, size, inner), shape, cut = position, tensor.shape, tensor.cut
    if cut is None:
        return ()
    region = [*[slice(None)] * cut.dim, cut.local_slice(shape[cut.dim], rank // inner, size // inner)]
    if cut.inner_dim is not None:
        region += [slice(None)] * (cut.inner_dim - cut.dim - 1)
        region.append(TensorCut(cut.inner_dim).local_slice(shape[cut.inner_dim], rank % inner, inner))
    return tuple(region)


def to_canonical(
    model: nn.Module, tensors: Tensors, name: str, tensor: Tensor, position: RankPosition = WHOLE
) -> Iterator[tuple[str, Tensor]]:
    """Canonical names and the contents of their regions, of a tensor shaped like parameter `name`.

    Memory may be shared. Padding is left out.
    """
    regions = canonical_regions(model, tensors, name, position)
    for (part, region), content in zip(regions.items(), get_fusion(model, name).split(tensor), strict=True):
        rows = region[0] if region else slice(None)
        yield part, content if rows.stop is None else content[: rows.stop - rows.start]


def from_canonical(
    model: nn.Module, tensors: Tensors, name: str, get: Callable[[str], Any], position: RankPosition = WHOLE
) -> Tensor:
    """A tensor shaped like parameter `name` from whole canonical tensors, of which only the regions are read.

    Padding rows are zero.
    """
    regions = canonical_regions(model, tensors, name, position)
    contents = (_pad(get(part)[region or ...], part, tensors[part], position[1]) for part, region in regions.items())
    return get_fusion(model, name).fuse([*contents])


def _pad(content: Tensor, name: str, tensor: CanonicalTensor, size: int) -> Tensor:
    """Zero rows at the end of a region whose cut pads."""
    cut = tensor.cut
    if cut is None or cut.divisor is None:
        return content
    assert cut.dim == 0, f"{name}: only rows can be padded"
    missing = cut.local_length(tensor.shape[0], size) - len(content)
    return F.pad(content, (*(0, 0) * (content.dim() - 1), 0, missing))


@torch.no_grad()
def load_canonical(model: CanonicalModel, get: Callable[[str], Tensor]) -> None:
    """Fill every parameter of a whole model from the canonical tensors that `get` returns; each is asked for once."""
    for name, parameter in list_stored(model):
        tensor = model.from_canonical(name, get)
        assert tensor.shape == parameter.shape, f"{name}: {tuple(tensor.shape)} is not {tuple(parameter.shape)}"
        parameter.copy_(tensor)


def canonical_state(model: CanonicalModel) -> dict[str, Tensor]:
    """Every canonical tensor of a model, detached; they may share the parameters' memory."""
    parameters = ((name, parameter.detach()) for name, parameter in list_stored(model))
    return dict(pair for name, tensor in parameters for pair in model.to_canonical(name, tensor))


@torch.no_grad()
def load_stream(model: CanonicalModel, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Fill every parameter of a whole model from a stream, as `stream_parameters` does."""
    parameters = dict(list_stored(model))
    stream_parameters(model, tensors, lambda name, get: parameters[name].copy_(model.from_canonical(name, get)))


def stream_parameters(
    model: CanonicalModel, tensors: Iterable[tuple[str, Tensor]], fill: Callable[[str, Callable[[str], Tensor]], object]
) -> None:
    """Call `fill(name, get)` for every parameter of a model, once the last of its canonical tensors has arrived.

    The stream may have any order; only tensors of parameters that are still incomplete are kept. `MtError` names
    everything missing, unexpected, repeated or misshapen at once; the model is then partly filled.
    """
    expected = model.config.canonical_shapes()
    parts = {name: _parts(get_fusion(as_module(model), name), name) for name, _ in list_stored(model)}
    owners = {part: name for name in parts for part in parts[name]}
    waiting: dict[str, dict[str, Tensor]] = {name: {} for name in parts}
    arrived: list[tuple[str, tuple[int, ...]]] = []
    for part, tensor in tensors:
        arrived.append((part, tuple(tensor.shape)))
        if expected.get(part) == arrived[-1][1] and owners.get(part) in waiting:
            name = owners[part]
            waiting[name][part] = tensor
            if len(waiting[name]) == len(parts[name]):
                fill(name, waiting.pop(name).__getitem__)
        del tensor  # or it would be in memory while the next one is read
    raise_if(stream_problems(expected, arrived))


def fit_heads(
    model: CanonicalModel, tensors: Iterable[tuple[str, Tensor]], seed: int, tell: Callable[[str], None]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint for a model that may have a task's head: without those of heads that the model has
    not, or has in another shape, and with initial values, which the seed decides, of what its heads lack.

    `tell` gets a line on what was left out and what was drawn. For other models the stream stays as it is.
    """
    if getattr(model.config, "task_head", None) is None:
        yield from tensors
        return
    expected, arrived, left_out = model.config.canonical_shapes(), set[str](), set[str]()
    for name, tensor in tensors:
        module = name.partition(".")[0]
        if module in HEAD_MODULES and expected.get(name) != tuple(tensor.shape):
            left_out.add(module)
        else:
            arrived.add(name)
            yield name, tensor
    missing = [name for name in expected if name.partition(".")[0] in HEAD_MODULES and name not in arrived]
    for name in missing:
        yield name, cast(Model, model).initial(seed, name)
    drawn = dict.fromkeys(name.partition(".")[0] for name in missing)
    for what, modules in (("drawn from the seed", drawn), ("left out of the checkpoint", sorted(left_out))):
        if modules:
            tell(f"{what}: {', '.join(modules)}")


def stream_problems(
    expected: Mapping[str, tuple[int, ...]], arrived: Sequence[tuple[str, tuple[int, ...]]]
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
            yield Problem(name, f"duplicate tensor ({counts[name]} copies)", "expected one")
