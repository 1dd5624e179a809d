"""A checkpoint's tensors to a rank's part of the model; the others' are read and dropped, one after the other.

Matrices are cut as in training, by the model's plan; what follows a cut is simpler, as there is no backward pass.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mt_core.distributed.mesh import Axis, Mesh
from mt_core.errors import MtError
from mt_core.parallel.apply import allocate_buffers
from mt_core.parallel.expert.dispatcher import Choices, Experts, Sent, TensorDispatcher, dispatch
from mt_core.parallel.tensor.linear import ColumnLinear, RowLinear
from mt_core.parallel.tensor.placement import Placement, apply_plan
from mt_core.pipeline.stages import balance_stages
from mt_eval.generation.ranks.part import ModelPart
from mt_models.canonical import list_stored, stream_parameters
from mt_models.config import GPTConfig
from mt_models.models.gpt import GPT


def make_part(
    config: GPTConfig, mesh: Mesh, device: torch.device, dtype: torch.dtype, tensors: Iterable[tuple[str, Tensor]]
) -> ModelPart:
    """This rank's part of a model, filled from the canonical tensors of the whole; `MtError` if it cannot be cut so."""
    stages = mesh.pipeline.size
    if stages > config.layers:
        raise MtError("--pipeline", f"{stages} stages for {config.layers} layers", f"at most {config.layers}")
    stage = balance_stages(config.layers, stages)[stages - 1 - mesh.pipeline.rank]
    default_dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            model = config.build(mesh.tensor.size)
    finally:
        torch.set_default_dtype(default_dtype)
    plan = model.plan(mesh.tensor.size)
    model.keep_stages([stage])
    names = [name for name, _ in model.named_modules()]
    plan = {pattern: rule for pattern, rule in plan.items() if any(fnmatchcase(name, pattern) for name in names)}
    placements = apply_plan(model, plan, mesh.tensor, expert=mesh.expert, expert_parts=mesh.expert_parts)
    replace_ops(model, mesh.tensor, exact=device.type == "cpu")
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False))
    allocate_buffers(model, dtype, device)
    fill(model, placements, tensors)
    return ModelPart(model.eval(), mesh, stage)


@torch.no_grad()
def fill(model: GPT, placements: dict[str, Placement], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Fill a rank's parameters, and the buffers that checkpoints have, from canonical tensors."""
    stored = dict(list_stored(model))

    def fill_one(name: str, get: Callable[[str], Any]) -> None:
        place = placements.get(name)
        position = () if place is None else (place.axis.rank, place.axis.size, place.inner)
        part = model.from_canonical(name, get, *position)
        assert part.shape == stored[name].shape, f"{name}: {tuple(part.shape)} is not {tuple(stored[name].shape)}"
        stored[name].copy_(part)

    stream_parameters(model, tensors, fill_one)


def replace_ops(model: GPT, axis: Axis, *, exact: bool) -> None:
    """Have the layers of a cut model sum over ranks as `SummedLinear` and `SummedExperts` do."""
    modules: Any = model.modules()
    for module in modules:
        op = getattr(module, "op", None)
        if isinstance(op, ColumnLinear):
            module.op = F.linear  # what each rank needs of x it has
        elif isinstance(op, RowLinear):
            module.op = SummedLinear(axis, exact)
        elif isinstance(op, TensorDispatcher):
            module.op = SummedExperts(axis, exact)


@dataclass(frozen=True, slots=True)
class SummedLinear:
    """`torch.nn.functional.linear` with a weight that is cut along its inputs, summed over ranks."""

    axis: Axis
    exact: bool

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """This rank's inputs in, all outputs out; the bias is added once."""
        y = sum_ranks(F.linear(x, weight), self.axis, exact=self.exact)
        return y if bias is None else y + bias


@dataclass(frozen=True, slots=True)
class SummedExperts:
    """The dispatcher of experts of which every rank has a part of the features, for tokens that every rank has."""

    axis: Axis
    exact: bool

    def send(self, x_ND: Tensor, choices: Choices) -> Sent:
        """Sort tokens by expert."""
        return dispatch.send(x_ND, choices)

    def run(self, sent: Sent, experts: Experts) -> Tensor:
        """Pass tokens through the parts of their experts, and sum over ranks."""
        return sum_ranks(dispatch.run(sent, experts), self.axis, exact=self.exact)


def sum_ranks(x: Tensor, axis: Axis, *, exact: bool) -> Tensor:
    """The sum over ranks; if it is to be exact, each element is added in the order of ranks, wherever it stands.

    An all-reduce adds in an order that depends on an element's place, which for two ranks makes no difference.
    """
    if not exact or axis.size == 2:
        return axis.sum_(x.contiguous())
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(axis.size)]
    dist.all_gather(parts, x.contiguous(), group=axis.group)
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total
