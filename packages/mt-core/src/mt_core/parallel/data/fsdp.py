"""Everything sharded: PyTorch's FSDP2 (`fully_shard`) behind the interface of `DataParallel`.

Main parameters are the fp32 shards; each block's weights are gathered in the model's dtype just before they are needed,
and gradients reduce-scattered, both overlapped with computation by FSDP2 itself.
"""

from collections.abc import Collection, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from mt_core.config.sections import ParallelConfig
from mt_core.contracts import Model, as_module
from mt_core.distributed.mesh import Axis, Mesh
from mt_core.parallel.tensor.placement import Placement


class FullyShard:
    """Data parallelism by FSDP2, with one group of weights for each block and one for the rest."""

    def __init__(
        self,
        model: Model,
        placements: Mapping[str, Placement],
        mesh: Mesh,
        *,
        device: torch.device,
        dtype: torch.dtype,
        gradients: torch.dtype,
        config: ParallelConfig,
    ) -> None:
        self.mesh, self.device, self.dtype, self.model = mesh, device, dtype, as_module(model)
        self.placements: Mapping[str, Placement] = placements
        self.shapes: Mapping[str, torch.Size] = {name: p.shape for name, p in model.named_parameters()}
        self._dims = {name: self._shard_dim(name) for name in self.shapes}
        dims = {id(p): Shard(self._dims[name]) for name, p in model.named_parameters()}
        wide = torch.promote_types(dtype, torch.float32)
        options = {
            "mp_policy": MixedPrecisionPolicy(None if dtype == wide else dtype, gradients, cast_forward_inputs=False),
            "shard_placement_fn": lambda parameter: dims[id(parameter)],
        }
        for parameter in model.parameters():
            parameter.data = parameter.data.to(wide if parameter.requires_grad else dtype)
        if experts := self._list_expert_modules():
            expert_mesh = make_device_mesh(mesh, device, mesh.expert_parts)
            for module in experts:
                fully_shard(module, mesh=expert_mesh, **options)
        dense_mesh = make_device_mesh(mesh, device, mesh.tensor)
        for block in model.layers.values():
            fully_shard(block, mesh=dense_mesh, **options)
        fully_shard(self.model, mesh=dense_mesh, **options)
        self.model.to_empty(device=device)
        register_fsdp_forward_method(self.model, "losses")
        if hasattr(self.model, "run_stage"):
            register_fsdp_forward_method(self.model, "run_stage")
        for module in self._list_fsdp_modules():
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        local = {name: shard for name, shard in self._list_local_shards() if shard.numel()}
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.main_params: Mapping[str, nn.Parameter] = {
            name: nn.Parameter(shard) for name, shard in local.items() if name in trainable
        }
        self.rounded_params: Mapping[Tensor, Tensor] = {}
        self.frozen: Mapping[str, Tensor] = {name: shard for name, shard in local.items() if name not in trainable}

    def _list_expert_modules(self) -> list[nn.Module]:
        """List the outermost modules that contain nothing but experts, if those are cut over ranks."""
        if self.mesh.expert.size == 1:
            return []
        modules: dict[str, nn.Module] = {}
        for name, module in self.model.named_modules():
            axes = [self.placements[f"{name}.{leaf}"].axis for leaf, _ in module.named_parameters() if name]
            inside = any(name.startswith(f"{outer}.") for outer in modules)
            if axes and not inside and all(axis == self.mesh.expert_parts for axis in axes):
                modules[name] = module
        return [*modules.values()]

    def shard_axis(self, name: str) -> Axis:
        """Return the shard axis of the parameter's kind, whether it is trained or frozen."""
        return self.mesh.shard_axes(self.placements[name].axis)[0]

    def _list_fsdp_modules(self) -> list[FSDPModule]:
        return [module for module in self.model.modules() if isinstance(module, FSDPModule)]

    def _list_local_shards(self) -> list[tuple[str, Tensor]]:
        parameters = self.model.named_parameters()
        return [(name, p.to_local().detach()) for name, p in parameters if isinstance(p, DTensor)]

    def _shard_dim(self, name: str) -> int:
        """Return the longest dim that the ranks divide, other than the one along which tensor ranks repeat entries."""
        shape, repeats = self.shapes[name], self.placements[name].replicated_from > 0
        size = self.shard_axis(name).size
        divisible = [d for d, n in enumerate(shape) if n % size == 0 and not (repeats and d == 1)]
        return max(divisible, key=lambda d: shape[d], default=0)

    def local_shard(self, name: str, whole: Tensor, rank: int) -> Tensor:
        """Return a chunk along the dim that is sharded; those of the last ranks may be empty."""
        chunks = whole.chunk(self.shard_axis(name).size, self._dims[name])
        return chunks[rank] if rank < len(chunks) else chunks[0].narrow(self._dims[name], 0, 0)

    def split_replicated(self, name: str, shard: Tensor) -> tuple[Tensor, Tensor]:
        """Split along dim 1 where groups are repeated; a replicated parameter is on other tensor ranks as a whole."""
        placement = self.placements[name]
        if placement.replicas.size == 1:
            return shard, shard[:0]
        if placement.dim is None:
            return shard[:0], shard
        edge = placement.replicated_from * self.shapes[name][1] // self.shapes[name].numel()
        return shard[:, :edge], shard[:, edge:]

    def compile(self) -> None:
        """Do nothing: FSDP2 accumulates gradients itself."""

    def begin_step(self) -> None:
        """Postpone the sums over replicas to the last backward pass; stages of a pipeline have several last ones."""
        for module in self._list_fsdp_modules():
            module.set_requires_all_reduce(self.mesh.pipeline.size > 1, recurse=False)

    def last_backward(self) -> None:
        """Sum over replicas too in the next backward pass."""
        for module in self._list_fsdp_modules():
            module.set_requires_all_reduce(True, recurse=False)

    def complete(self, names: Collection[str]) -> None:
        """Do nothing: FSDP2 reduces gradients in every backward pass."""

    def reduce(self) -> None:
        """Set the gradients of the main parameters: FSDP2 has reduced them in the backward passes."""
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        missing = [name for name, p in parameters.items() if p.grad is None]
        assert not missing, f"no gradient reached {missing}"
        for name, main_param in self.main_params.items():
            gradient = parameters[name].grad
            assert isinstance(gradient, DTensor)
            main_param.grad = gradient.to_local()

    def all_gather_params(self, *, rounded: bool = False) -> None:
        """Discard the gradients: the main parameters are the model's own shards, which the forward pass gathers."""
        for parameter in (*self.main_params.values(), *self.model.parameters()):
            parameter.grad = None

    def wait(self) -> None:
        """Do nothing: the forward pass gathers the weights itself."""


def make_device_mesh(mesh: Mesh, device: torch.device, cut: Axis) -> DeviceMesh:
    """Make torch's mesh of the shard axis of parameters that are cut over `cut`, with the replica axis before it under
    hybrid sharding."""
    shard, replica = mesh.shard_axes(cut)
    shard_group = shard.group or dist.new_group([dist.get_rank()], use_local_synchronization=True)
    assert isinstance(shard_group, dist.ProcessGroup)
    if replica.group is None:
        return DeviceMesh.from_group(shard_group, device.type)
    axis = "expert_data_parallel" if cut == mesh.expert_parts else "data_context"
    ranks = torch.tensor(mesh.dims.group(axis, dist.get_rank())).view(replica.size, shard.size)
    return DeviceMesh.from_group([replica.group, shard_group], device.type, ranks, mesh_dim_names=("replica", "shard"))
