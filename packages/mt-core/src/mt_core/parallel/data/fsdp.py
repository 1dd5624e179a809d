"""Everything sharded: PyTorch's FSDP2 (`fully_shard`) behind the interface of `DataParallel`.

Masters are the fp32 shards; each block's weights are gathered in the model's dtype just before they are needed, and
gradients reduce-scattered, both overlapped with computation by FSDP2 itself.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from mt_core.config.sections import ParallelConfig
from mt_core.contracts import Model, as_module
from mt_core.distributed.mesh import Axis, Mesh
from mt_core.parallel.tensor.plan import Placement


class FullyShard:
    """`DataParallel` by FSDP2, one group of weights for each block and one for the rest."""

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
        if experts := self._experts():
            over = device_mesh(mesh, device, mesh.expert)
            for module in experts:
                fully_shard(module, mesh=over, **options)
        over = device_mesh(mesh, device, mesh.tensor)
        for block in model.layers.values():
            fully_shard(block, mesh=over, **options)
        fully_shard(self.model, mesh=over, **options)
        self.model.to_empty(device=device)
        register_fsdp_forward_method(self.model, "losses")
        for module in self._groups():
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        local = {name: part for name, part in self._locals() if part.numel()}
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.masters: Mapping[str, nn.Parameter] = {
            name: nn.Parameter(part) for name, part in local.items() if name in trainable
        }
        self.frozen: Mapping[str, Tensor] = {name: part for name, part in local.items() if name not in trainable}

    def _experts(self) -> list[nn.Module]:
        """The modules that hold nothing but experts, if those are cut over ranks."""
        if self.mesh.expert.size == 1:
            return []
        found: dict[str, nn.Module] = {}
        for name, module in self.model.named_modules():
            held = [self.placements[f"{name}.{leaf}"].axis for leaf, _ in module.named_parameters() if name]
            inside = any(name.startswith(f"{outer}.") for outer in found)
            if held and not inside and all(axis == self.mesh.expert for axis in held):
                found[name] = module
        return [*found.values()]

    def shard_axis(self, name: str) -> Axis:
        """Trained or frozen, a parameter is shared over the shard axis of its kind."""
        return self.mesh.sharing(self.placements[name].axis)[0]

    def _groups(self) -> list[FSDPModule]:
        return [module for module in self.model.modules() if isinstance(module, FSDPModule)]

    def _locals(self) -> list[tuple[str, Tensor]]:
        parameters = self.model.named_parameters()
        return [(name, p.to_local().detach()) for name, p in parameters if isinstance(p, DTensor)]

    def _shard_dim(self, name: str) -> int:
        """The longest dim that the ranks divide; not the one that copies for other tensor ranks lie along."""
        shape, replicated = self.shapes[name], self.placements[name].replicated_from > 0
        fits = [d for d, n in enumerate(shape) if n % self.shard_axis(name).size == 0 and not (replicated and d == 1)]
        return max(fits, key=lambda d: shape[d], default=0)

    def view(self, name: str, whole: Tensor, rank: int) -> Tensor:
        """A chunk along the dim that is cut; the last ranks may have none."""
        chunks = whole.chunk(self.shard_axis(name).size, self._dims[name])
        return chunks[rank] if rank < len(chunks) else chunks[0].narrow(self._dims[name], 0, 0)

    def split(self, name: str, part: Tensor) -> tuple[Tensor, Tensor]:
        """Along dim 1 where groups are repeated; a replicated parameter is held by all."""
        place = self.placements[name]
        if place.replicas.size == 1:
            return part, part[:0]
        if place.dim is None:
            return part[:0], part
        edge = place.replicated_from * self.shapes[name][1] // self.shapes[name].numel()
        return part[:, :edge], part[:, edge:]

    def compile(self) -> None:
        """FSDP2 adds gradients up in its own way."""

    def begin_step(self) -> None:
        """Sums over replicas wait for the last backward pass."""
        for module in self._groups():
            module.set_requires_all_reduce(False, recurse=False)

    def last_backward(self) -> None:
        """The next backward pass sums over replicas too."""
        for module in self._groups():
            module.set_requires_all_reduce(True, recurse=False)

    def reduce(self) -> None:
        """FSDP2 has reduced them in the backward passes."""
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        missing = [name for name, p in parameters.items() if p.grad is None]
        assert not missing, f"no gradient reached {missing}"
        for name, master in self.masters.items():
            gradient = parameters[name].grad
            assert isinstance(gradient, DTensor)
            master.grad = gradient.to_local()

    def publish(self) -> None:
        """The masters are the model's own shards."""
        for parameter in (*self.masters.values(), *self.model.parameters()):
            parameter.grad = None

    def wait(self) -> None:
        """Weights are gathered by the forward pass itself."""


def device_mesh(mesh: Mesh, device: torch.device, cut: Axis) -> DeviceMesh:
    """The shard axis of what is cut over `cut`, and for hybrid sharding the replica axis before it, as torch's mesh."""
    shard, replica = mesh.sharing(cut)
    own = shard.group or dist.new_group([dist.get_rank()], use_local_synchronization=True)
    assert isinstance(own, dist.ProcessGroup)
    if replica.group is None:
        return DeviceMesh.from_group(own, device.type)
    axis = "expert_data_parallel" if cut == mesh.expert else "data_context"
    ranks = torch.tensor(mesh.dims.group(axis, dist.get_rank())).view(replica.size, shard.size)
    return DeviceMesh.from_group([replica.group, own], device.type, ranks, mesh_dim_names=("replica", "shard"))
