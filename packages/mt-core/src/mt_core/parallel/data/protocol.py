"""Data parallelism: what the training step asks of it, whichever of the three strategies does it."""

from collections.abc import Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from mt_core.config.sections import ParallelConfig, PrecisionConfig
from mt_core.contracts import Model
from mt_core.distributed.mesh import Axis, Mesh
from mt_core.parallel.tensor.placement import Placement

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


class DataParallel(Protocol):
    """Weights, gradients and what the optimizer updates, spread over the ranks that see different tokens.

    A step is `begin_step`, backward passes (`last_backward` before the last), `reduce`, the optimizer's step over
    `main_params`, `all_gather_params`.
    """

    mesh: Mesh
    device: torch.device
    placements: Mapping[str, Placement]
    dtype: torch.dtype
    """Data type of the weights that the model computes with."""
    main_params: Mapping[str, nn.Parameter]
    """This rank's shard of each trainable parameter, in fp32 or wider, which the optimizer updates; parameters of which
    the rank has no element are left out."""
    rounded_params: Mapping[Tensor, Tensor]
    """By main parameter, the same part of the model's weights, flat, where those have a narrower data type and are kept
    between steps."""
    frozen: Mapping[str, Tensor]
    """This rank's shard of each parameter that is not trained, in `dtype`: no gradient, no optimizer state."""
    shapes: Mapping[str, torch.Size]
    """Shape of every parameter on this tensor rank, in the model's order."""

    def shard_axis(self, name: str) -> Axis:
        """Return the axis of the ranks that hold the other shards of a parameter, trained or frozen."""
        ...

    def local_shard(self, name: str, whole: Tensor, rank: int) -> Tensor:
        """Return the part of a tensor shaped like parameter `name` that rank `rank` of its shard axis holds."""
        ...

    def split_replicated(self, name: str, shard: Tensor) -> tuple[Tensor, Tensor]:
        """Split a tensor shaped like main parameter `name` into what this tensor rank alone holds, and what other
        tensor ranks hold as well."""
        ...

    def compile(self) -> None:
        """Use torch.compile for what is done to gradients."""
        ...

    def begin_step(self) -> None:
        """Discard the gradients of the last step."""
        ...

    def last_backward(self) -> None:
        """The next backward pass is the step's last: reduction may begin as gradients become complete."""
        ...

    def complete(self, names: Collection[str]) -> None:
        """Parameters of these names get no further gradient in this step: their reduction may begin."""
        ...

    def reduce(self) -> None:
        """Set the `.grad` of every main parameter to its shard of the gradients' sum over all tokens."""
        ...

    def all_gather_params(self, *, rounded: bool = False) -> None:
        """Update the model's weights from the main parameters of all ranks; the all-gather may outlast this call.

        `rounded`: this rank's parts of the weights, `rounded_params`, are those of the main parameters already.
        """
        ...

    def wait(self) -> None:
        """Wait until the all-gather of the parameters has finished."""
        ...


def make_data_parallel(
    model: Model,
    placements: Mapping[str, Placement],
    mesh: Mesh,
    *,
    device: torch.device,
    precision: PrecisionConfig,
    parallel: ParallelConfig,
) -> DataParallel:
    """Build the configured strategy for a model on meta, and allocate the model's parameters, uninitialised."""
    from mt_core.parallel.data.fsdp import FullyShard
    from mt_core.parallel.data.zero1 import Buckets

    dtype = DTYPES[precision.dtype]
    automatic = {"fp16": torch.float16, "fp64": torch.float64}.get(precision.dtype, torch.float32)
    gradients = automatic if precision.gradients == "auto" else DTYPES[precision.gradients]
    strategy = FullyShard if parallel.sharding == "fsdp" and mesh.shard.size > 1 else Buckets
    return strategy(model, placements, mesh, device=device, dtype=dtype, gradients=gradients, config=parallel)
