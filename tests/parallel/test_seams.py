"""A model from outside meets every kind of layout: what nobody would join again, or pass on, is refused by name.

The model is a GPT with a gate of its own after the last layer, as a plugin may bring one.
"""

from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layouts import run_config
from mt_core.contracts import BatchKey
from mt_core.distributed.mesh import Axis, Mesh
from mt_core.distributed.topology import ParallelDims
from mt_core.errors import MtError
from mt_core.parallel.apply import parallelize
from mt_core.parallel.tensor.placement import apply_plan
from mt_core.parallel.tensor.plan import Column, Expert, Plan, Replicate, Rule
from mt_core.training.step import backward
from mt_core.verification.ranks import run_ranks
from mt_models.config import GPTConfig
from mt_models.config.tensors import CanonicalTensor, Tensors
from mt_models.models.gpt import GPT
from rank_states import batches_of, state_of

CPU = torch.device("cpu")
RULES: dict[str, Rule] = {"cut": Column(dim=0), "expert": Expert(), "whole": Replicate()}


def scale_features(x_BTD: Tensor, weight_D: Tensor) -> Tensor:
    return x_BTD * weight_D


class Gate(nn.Module):
    """A factor for each feature; cut, every rank would have the product of other features."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.op = scale_features

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.op(x_BTD, self.weight)


class GatedGPT(GPT):
    """A GPT with a gate."""

    batch_keys = MappingProxyType({**GPT.batch_keys, "tags": BatchKey(None)})

    def __init__(self, config: "GatedConfig", tensor: int = 1) -> None:
        super().__init__(config, tensor)
        self.gate = Gate(config.hidden_size)

    def run_layers(self, *inputs: Any, **more: Any) -> Tensor:
        return self.gate(super().run_layers(*inputs, **more))

    def plan(self, tensor: int) -> Plan:
        return {**super().plan(tensor), "gate": RULES[self.config.rule]}


class GatedConfig(GPTConfig):
    """The GPT's fields, and how the plan cuts the gate."""

    rule: str = "whole"

    def build(self, tensor: int = 1) -> GatedGPT:
        return GatedGPT(self, tensor)

    def canonical_tensors(self) -> Tensors:
        return {**super().canonical_tensors(), "gate.weight": CanonicalTensor((self.hidden_size,))}


LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor": 2},
    "tensor, sequence": {"tensor": 2, "sequence": True},
    "tensor × context, ring": {"tensor": 2, "context": 2},
    "tensor × context, all-gather": {"tensor": 2, "context": 2, "cp_comm_type": "all_gather"},
    "tensor × context, all-to-all": {"tensor": 2, "context": 2, "cp_comm_type": "all_to_all"},
    "tensor × data": {"tensor": 2, "data": 2},
    "tensor × zero1": {"tensor": 2, "data": 2, "sharding": "zero1"},
    "tensor × fsdp": {"tensor": 2, "data": 2, "sharding": "fsdp"},
    "expert": {"expert": 2, "data": 2},
    "expert × tensor": {"expert": 2, "tensor": 2, "data": 2},
}


def gated_config(rule: str, parallel: dict[str, Any], model: str = "gqa") -> Any:
    config = run_config(model, parallel=parallel)
    return config.model_copy(update={"model": GatedConfig(**config.model.model_dump(), rule=rule)})


def second_rank(parallel: dict[str, Any]) -> Mesh:
    """The mesh as the last rank sees it, without process groups: the plan is refused before they are needed."""
    sizes = {name: parallel.get(name, 1) for name in ("data", "context", "tensor", "expert")}
    dims = ParallelDims(sizes["data"], sizes["context"], sizes["tensor"], None, sizes["expert"], whole_experts=True)
    axes = {name: Axis(name, size - 1, size) for name, size in sizes.items()}
    return Mesh(dims, **axes, expert_parts=axes["expert"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cut_module_without_a_parallel_implementation_is_refused_under_every_layout(layout):
    parallel, cut = LAYOUTS[layout], "expert" if layout == "expert" else "cut"
    model, mesh = "experts" if "expert" in parallel else "gqa", second_rank(parallel)
    with pytest.raises(MtError) as error:
        parallelize(gated_config(cut, parallel, model), mesh, CPU)
    (line,) = str(error.value).splitlines()
    kind = type(RULES[cut]).__name__
    assert line.startswith(
        f"plan of 'gate': {kind} cuts the module, but its op scale_features has no parallel implementation; "
    )
    assert line.endswith("or leave the module whole with Replicate")
    with torch.device("meta"):
        whole = gated_config("whole", parallel, model).model.build(mesh.tensor.size)
    placements = apply_plan(
        whole, whole.plan(mesh.tensor.size), mesh.tensor, sequence="sequence" in parallel, expert=mesh.expert
    )
    assert placements["gate.weight"].dim is None


KEYED = {
    "context, ring": {"context": 2},
    "context, all-gather": {"context": 2, "cp_comm_type": "all_gather"},
    "context, all-to-all": {"context": 2, "cp_comm_type": "all_to_all"},
    "data": {},
    "zero1": {"sharding": "zero1"},
    "fsdp": {"sharding": "fsdp"},
    "tensor": {"tensor": 2},
    "tensor, sequence": {"tensor": 2, "sequence": True},
}


def try_keys(axis: Axis) -> dict[str, list[str]]:
    """What each layout says of a batch with a key that the model leaves out, and of one that it does not know."""
    said: dict[str, list[str]] = {}
    for name, parallel in KEYED.items():
        state = state_of(gated_config("whole", parallel), axis.size)
        batch = batches_of(gated_config("whole", parallel), state.data_parallel.mesh)[0]
        for key in ("tags", "token_weights"):
            try:
                backward(state.model, state.data_parallel, [batch | {key: torch.ones(1, 16)}], 16.0, CPU)
                said.setdefault(name, []).append("taken")
            except MtError as error:
                said.setdefault(name, []).append(str(error))
    return said


@pytest.mark.slow
def test_a_batch_key_that_the_model_does_not_declare_is_refused_under_every_layout():
    expected = "batch: unknown key 'token_weights' for a model of kind 'gpt'; "
    for said in run_ranks(2, try_keys):
        assert said.keys() == KEYED.keys()
        for declared, undeclared in said.values():
            assert declared == "taken"
            assert undeclared.startswith(expected)
            assert undeclared.endswith(f"allowed: {', '.join(GatedGPT.batch_keys)}")
