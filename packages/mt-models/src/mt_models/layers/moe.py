"""A mixture of experts: a router sends each token through `top_k` of E gated feed-forward layers (arXiv:2101.03961).

Experts run in a loop, each on the tokens that chose it, or on a GPU in bf16 as one grouped matrix product. Where they
are is the business of `Experts.op`. Every token also passes through the shared expert, if there is one.

Shape suffixes: B batch, T tokens, D model size, E experts, F hidden features, N = B·T tokens, C choices of a token,
M = N·C tokens in the order of their experts.
"""

from collections.abc import Callable, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from mt_core.parallel.dropout import DropoutKeys
from mt_core.parallel.expert.dispatcher import Choices, Sent, TokenDispatcher, dispatch
from mt_core.parallel.tensor.plan import used_elsewhere
from mt_core.parallel.tensor.weight_gradients import WeightSum
from mt_models import config
from mt_models.config.mlp import GATE_UP
from mt_models.fusion import stack_parts
from mt_models.layers.basic import Linear
from mt_models.layers.expert_products import multiply_grouped, multiply_looped, multiply_summed, runs_grouped
from mt_models.layers.fused_gate import gate
from mt_models.layers.router import Router, Routing
from mt_models.layers.router_losses import RoutingRecord


class ExpertWeights(nn.Module):
    """A weight for each expert."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.op = used_elsewhere
        self.weight_sum: WeightSum | None = None
        """What the gradient is added to, unless the engine does that."""

    def multiply(self, x_MI: Tensor, counts_E: Tensor, rows: Sequence[int] | None) -> Tensor:
        """Each expert's rows times its weight, the first of whose dims after the experts' are outputs."""
        product = multiply_grouped if runs_grouped(x_MI, self.weight) else multiply_looped
        weight_EOI = self.weight.flatten(1, -2)
        if self.weight_sum is None:
            return product(x_MI, weight_EOI, counts_E)
        return multiply_summed(x_MI, weight_EOI, counts_E, rows, self.weight_sum, product)


class Experts(nn.Module):
    """Gated feed-forward layers; gate and up are one weight [E, 2, F, D]."""

    fusions = MappingProxyType({"gate_up.weight": stack_parts(GATE_UP, dim=1)})

    def __init__(self, part: config.MoE, size: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_up = ExpertWeights(part.experts, 2, part.ffn_hidden_size, size)
        self.down = ExpertWeights(part.experts, size, part.ffn_hidden_size)
        self.activation = activation
        self.op: TokenDispatcher = dispatch

    def forward(self, sent: Sent) -> Tensor:
        """Pass tokens on their way through their experts; return each token's weighted sum, [N, D]."""
        return self.op.run(sent, self.feed)

    def feed(self, x_MD: Tensor, counts_E: Tensor, rows: Sequence[int] | None) -> Tensor:
        """[M, D] to the same shape, for rows whose experts are all on this rank; `rows` are their counts on the host,
        if those are known."""
        gate_up_M2F = self.gate_up.multiply(x_MD, counts_E, rows)
        return self.down.multiply(gate(gate_up_M2F, self.activation), counts_E, rows)


class MoE(nn.Module):
    """The sum of a token's experts, weighted by its router, and of the shared expert."""

    def __init__(
        self, part: config.MoE, size: int, activation: Callable[[Tensor], Tensor], shared: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.router = Router(part, size)
        self.experts = Experts(part, size, activation)
        self.shared = shared
        self.shared_gate = Linear(size, 1) if part.shared_gate else None
        self.part = part

    def forward(self, x_BTD: Tensor, record: RoutingRecord | None = None, keys: DropoutKeys | None = None) -> Tensor:
        """[B, T, D] to the same shape; the router's losses of each sequence, [B], are left in the layer's record."""
        sent = self.experts.op.send(x_BTD.flatten(0, 1), self.list_choices(self.router(x_BTD, record, keys)))
        shared_BTD = None if self.shared is None else self.run_shared(self.shared, x_BTD)  # while tokens travel
        y_BTD = self.experts(sent).view_as(x_BTD)
        return y_BTD if shared_BTD is None else y_BTD + shared_BTD

    def list_choices(self, routing: Routing) -> Choices:
        """List the choices of the tokens of all sequences."""
        kept_NC = None if routing.kept_BTC is None else routing.kept_BTC.flatten(0, 1)
        weights_NC, chosen_NC = routing.weights_BTC.flatten(0, 1), routing.chosen_BTC.flatten(0, 1)
        return Choices(weights_NC, chosen_NC, kept_NC, self.part.experts, self.router.get_padding(routing))

    def run_shared(self, shared: nn.Module, x_BTD: Tensor) -> Tensor:
        """Pass tokens through the shared expert, and its gate if there is one."""
        y_BTD = shared(x_BTD)
        return y_BTD if self.shared_gate is None else self.shared_gate(x_BTD).sigmoid() * y_BTD
