"""Feed-forward layers: each takes features and, for what only a mixture of experts does with them, the record of
its router and the layer's dropout keys.

Shape suffixes: B batch, T tokens, D model size, F hidden features."""

from functools import partial
from types import MappingProxyType

import torch.nn.functional as F
from torch import Tensor, nn

from mt_core.parallel.dropout import DropoutKeys
from mt_core.parallel.tensor.plan import Column, Expert, Plan, Row, Sequence
from mt_models import config
from mt_models.config.lora import Lora
from mt_models.config.mlp import GATE_UP
from mt_models.fusion import stack_parts
from mt_models.layers.basic import Linear
from mt_models.layers.lora import add_adapter, column_plan, make_adapter, make_linear, row_plan
from mt_models.layers.moe import MoE
from mt_models.layers.router_losses import RoutingRecord


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)² (arXiv:2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "squared_relu": squared_relu,
    "silu": F.silu,
}


class Dense(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, part: config.Dense, size: int, lora: Lora | None = None) -> None:
        super().__init__()
        self.up = make_linear(lora, "up", size, part.ffn_hidden_size, bias=part.bias)
        self.down = make_linear(lora, "down", part.ffn_hidden_size, size, bias=part.bias)
        self.activation = ACTIVATIONS[part.activation]

    def forward(self, x_BTD: Tensor, record: RoutingRecord | None = None, keys: DropoutKeys | None = None) -> Tensor:
        """[B, T, D] to the same shape; leaves nothing in the record, and draws nothing."""
        del record, keys
        return self.down(self.activation(self.up(x_BTD)))


class Gated(nn.Module):
    """down(activation(gate(x)) · up(x)) (arXiv:2002.05202); gate and up are one weight [2, F, D]."""

    fusions = MappingProxyType({f"gate_up.{leaf}": stack_parts(GATE_UP) for leaf in ("weight", "bias")})

    def __init__(self, part: config.Gated, size: int, lora: Lora | None = None) -> None:
        super().__init__()
        self.gate_up = Linear(size, (2, part.ffn_hidden_size), bias=part.bias)
        self.gate, self.up = (make_adapter(lora, target, size, part.ffn_hidden_size) for target in ("gate", "up"))
        self.down = make_linear(lora, "down", part.ffn_hidden_size, size, bias=part.bias)
        self.activation = ACTIVATIONS[part.activation]

    def forward(self, x_BTD: Tensor, record: RoutingRecord | None = None, keys: DropoutKeys | None = None) -> Tensor:
        """[B, T, D] to the same shape; leaves nothing in the record, and draws nothing."""
        del record, keys
        gate_BTF, up_BTF = self.gate_up(x_BTD).unbind(-2)
        gate_BTF, up_BTF = add_adapter(gate_BTF, self.gate, x_BTD), add_adapter(up_BTF, self.up, x_BTD)
        return self.down(self.activation(gate_BTF) * up_BTF)


def make_mlp(part: config.Dense | config.Gated | config.MoE, size: int, lora: Lora | None = None) -> nn.Module:
    """The feed-forward layer that a configuration part describes; a mixture of experts has no adapters."""
    match part:
        case config.MoE():
            shared = Gated(part.shared, size) if part.shared is not None else None
            return MoE(part, size, ACTIVATIONS[part.activation], shared)
        case config.Gated():
            return Gated(part, size, lora)
        case config.Dense():
            return Dense(part, size, lora)


def plan(part: config.Dense | config.Gated | config.MoE, lora: Lora | None = None) -> Plan:
    """Cut by hidden feature; experts are cut by their number, and by hidden feature if tensor ranks share each."""
    match part:
        case config.MoE():
            shared = plan(part.shared) if part.shared is not None else {}
            rules: Plan = {f"shared.{name}": rule for name, rule in shared.items()}
            gate: Plan = {"shared_gate": Sequence()} if part.shared_gate else {}
            dense = plan(part.dense) if part.dense is not None else {}  # of the first layers
            stacks: Plan = {"experts.gate_up": Expert(inner_dim=2), "experts.down": Expert(inner_dim=2)}
            return {"router": Sequence(), "experts": Expert(), **stacks, **rules, **gate, **dense}
        case config.Gated():
            adapters = [column_plan(lora, target, Column(dim=0)) for target in GATE_UP.parts]
            return {
                "gate_up": Column(dim=1),
                "down": Row(dim=1),
                **adapters[0],
                **adapters[1],
                **row_plan(lora, "down"),
            }
        case config.Dense():
            adapters = {**column_plan(lora, "up", Column(dim=0)), **row_plan(lora, "down")}
            return {"up": Column(dim=0), "down": Row(dim=1), **adapters}
