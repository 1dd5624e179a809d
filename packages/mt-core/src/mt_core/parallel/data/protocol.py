"""Data parallelism: what the training step asks of it, whichever of the three strategies does it."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from mt_core.config.sections import ParallelConfig, PrecisionConfig
from mt_core.contracts import Model
from mt_core.distributed.mesh import Axis, Mesh
from mt_core.parallel.tensor.plan import Placement

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


class DataParallel(Protocol):
    """Weights, gradients and what the optimizer updates, spread over the ranks that see different tokens.

    A step is `begin_step`, backward passes (`last_backward` before the last), `reduce`, the optimizer's step over
    `masters`, `publish`.
    """

    mesh: Mesh
    device: torch.device
    placements: Mapping[str, Placement]
    dtype: torch.dtype
    """Of the weights the model computes with."""
    masters: Mapping[str, nn.Parameter]
    """This rank's part of each trainable parameter, in fp32 or wider; parameters of which it has none are left out."""
    frozen: Mapping[str, Tensor]
    """This rank's part of each parameter that is not trained, in `dtype`; it has no gradient and no optimizer state."""
    shapes: Mapping[str, torch.Size]
    """Of every parameter on this tensor rank, in the model's order."""

    def shard_axis(self, name: str) -> Axis:
        """The ranks that hold the other parts of a parameter's master, or of the parameter itself if it is frozen."""
        ...

    def view(self, name: str, whole: Tensor, rank: int) -> Tensor:
        """The part of a tensor shaped like parameter `name` that rank `rank` of its shard axis holds."""
        ...

    def split(self, name: str, part: Tensor) -> tuple[Tensor, Tensor]:
        """A tensor shaped like a master: what other tensor ranks do not hold, and what they hold as well."""
        ...

    def compile(self) -> None:
        """Use torch.compile for what is done to gradients."""
        ...

    def begin_step(self) -> None:
        """Forget the gradients of the last step."""
        ...

    def last_backward(self) -> None:
        """The next backward pass is the step's last: reduction may begin as gradients become complete."""
        ...

    def reduce(self) -> None:
        """Give every master, as its `.grad`, its part of the gradients' sum over all tokens."""
        ...

    def publish(self) -> None:
        """Give the model the masters' values; the copies may still be on their way when this returns."""
        ...

    def wait(self) -> None:
        """Wait until the model has the published values."""
        ...


def data_parallel(
    model: Model,
    placements: Mapping[str, Placement],
    mesh: Mesh,
    *,
    device: torch.device,
    precision: PrecisionConfig,
    parallel: ParallelConfig,
) -> DataParallel:
    """The strategy of the configuration, for a model on meta, whose parameters it allocates, uninitialised."""
    from mt_core.parallel.data.fsdp import FullyShard
    from mt_core.parallel.data.zero1 import Buckets

    dtype = DTYPES[precision.dtype]
    automatic = {"fp16": torch.float16, "fp64": torch.float64}.get(precision.dtype, torch.float32)
    gradients = automatic if precision.gradients == "auto" else DTYPES[precision.gradients]
    kind = FullyShard if parallel.sharding == "fsdp" and mesh.shard.size > 1 else Buckets
    return kind(model, placements, mesh, device=device, dtype=dtype, gradients=gradients, config=parallel)
