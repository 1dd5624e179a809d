"""Two records of the same run, compared."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mt_core.verification.measure import NamedTensors, Record


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest difference of one quantity between a run and its reference, relative to the reference."""

    quantity: str
    relative: float


def compare_records(run: Record, reference: Record) -> list[Difference]:
    """Differences of losses, norms, each gradient (the worst of all recorded steps) and each weight, in that order.

    A tensor's scale is its largest element, or the root mean square of all tensors where that is more: the gradient of
    a key's bias, for one, is zero but for rounding.
    """
    compared = [
        Difference("loss", _relative(_vector(run.losses), _vector(reference.losses))),
        Difference("grad norm", _relative(_vector(run.norms), _vector(reference.norms))),
    ]
    steps = [dict(tensor_differences(a, b)) for a, b in zip(run.gradients, reference.gradients, strict=True)]
    compared += [Difference(f"gradient of {name}", max(step[name] for step in steps)) for name in steps[0]]
    return compared + [Difference(name, value) for name, value in tensor_differences(run.weights, reference.weights)]


def tensor_differences(run: NamedTensors, reference: NamedTensors) -> Iterator[tuple[str, float]]:
    """By name, the largest difference between two sets of tensors, relative as in `compare_records`."""
    assert run.keys() == reference.keys(), f"{run.keys() ^ reference.keys()} are only in one of the two"
    elements = sum(t.numel() for t in reference.values())
    floor = (sum(float(t.double().square().sum()) for t in reference.values()) / elements) ** 0.5
    for name, tensor in reference.items():
        yield name, _relative(run[name], tensor, floor)


def _relative(value: Tensor, reference: Tensor, floor: float = 0.0) -> float:
    """max |a − b| ÷ max |b|, in fp64; infinite where only one of them is finite."""
    a, b = value.double(), reference.double()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    scale = max(b.nan_to_num(posinf=0, neginf=0).abs().amax().item(), floor)
    return (a - b).nan_to_num().abs().amax().item() / (scale or 1.0)


def _vector(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
