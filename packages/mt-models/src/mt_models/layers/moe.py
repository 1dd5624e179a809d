"""A mixture of experts: a router sends each token through `top_k` of E gated feed-forward layers (arXiv:2101.03961).

The router computes in fp32 or wider: a rounded logit may choose another expert. Experts run in a loop, each on the
tokens that chose it, or on a GPU in bf16 as one grouped matrix product.

Shape suffixes: B batch, T tokens, D model size, E experts, F hidden features, N = B·T tokens, C choices of a token,
M = N·C tokens in the order of their experts.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mt_models import config
from mt_models.layers.linear import Linear


class Stack(nn.Module):
    """A weight for each expert."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


class Experts(nn.Module):
    """Gated feed-forward layers; gate and up are one weight [E, 2, F, D]."""

    def __init__(self, part: config.MoE, size: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_up = Stack(part.experts, 2, part.size, size)
        self.down = Stack(part.experts, size, part.size)
        self.activation = activation

    def forward(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        """[M, D] to the same shape; the first counts[0] rows are the first expert's, and so on."""
        multiply = grouped if runs_grouped(x_MD, self.gate_up.weight, self.down.weight) else looped
        gate_MF, up_MF = multiply(x_MD, self.gate_up.weight.flatten(1, 2), counts_E).chunk(2, -1)
        return multiply(self.activation(gate_MF) * up_MF, self.down.weight, counts_E)


class MoE(nn.Module):
    """The sum of a token's experts, weighted by its router."""

    def __init__(self, part: config.MoE, size: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.router = Linear(size, part.experts)
        self.experts = Experts(part, size, activation)
        self.part = part

    def forward(self, x_BTD: Tensor, balances: list[Tensor] | None = None) -> Tensor:
        """[B, T, D] to the same shape; the balance loss of each sequence, [B], is appended to `balances`."""
        with torch.autocast(x_BTD.device.type, enabled=False):
            wide = torch.promote_types(x_BTD.dtype, torch.float32)
            logits_BTE = F.linear(x_BTD.to(wide), self.router.weight.to(wide))
        weights_BTC, chosen_BTC = choose(logits_BTE, self.part.top_k, normalized=self.part.normalized)
        if balances is not None and self.part.balance:
            balances.append(self.part.balance * imbalance(logits_BTE, chosen_BTC))
        x_ND, chosen_NC = x_BTD.flatten(0, 1), chosen_BTC.flatten(0, 1)
        order_M = chosen_NC.flatten().argsort(stable=True)
        tokens_M = order_M // self.part.top_k
        counts_E = hits(chosen_NC.flatten(), self.part.experts).sum(0)
        y_MD = self.experts(x_ND[tokens_M], counts_E)
        y_MD = y_MD * weights_BTC.flatten()[order_M, None].to(y_MD.dtype)
        return torch.zeros_like(x_ND, dtype=y_MD.dtype).index_add(0, tokens_M, y_MD).view_as(x_BTD)


def choose(logits_BTE: Tensor, top_k: int, *, normalized: bool) -> tuple[Tensor, Tensor]:
    """Weights and numbers of each token's experts, [B, T, C]: a softmax over the chosen logits or over all."""
    if normalized:
        highest_BTC, chosen_BTC = logits_BTE.topk(top_k, dim=-1)
        return highest_BTC.softmax(-1), chosen_BTC
    return logits_BTE.softmax(-1).topk(top_k, dim=-1)


def imbalance(logits_BTE: Tensor, chosen_BTC: Tensor) -> Tensor:
    """Σ_e E · (share of choices that fell on e) · (mean probability of e) of each sequence, [B]: 1 when all is even.

    By sequence, not by micro-batch, so that it does not depend on how a batch is cut (arXiv:2405.04434, eq. 12-14).
    """
    experts = logits_BTE.shape[-1]
    shares_BE = hits(chosen_BTC.flatten(1), experts).to(logits_BTE.dtype).mean(1)
    return experts * (shares_BE * logits_BTE.softmax(-1).mean(1)).sum(-1)


def hits(chosen: Tensor, experts: int) -> Tensor:
    """Which expert each choice is, boolean […, E]; unlike `bincount`, it does not wait for the GPU."""
    return chosen[..., None] == torch.arange(experts, device=chosen.device)


def looped(x_MI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """Each expert's rows times its weight, one expert after the other."""
    parts = x_MI.split(counts_E.tolist())
    return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weight_EOI, strict=True)])


def grouped(x_MI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """The same as one kernel, which needs no count on the host."""
    return F.grouped_mm(x_MI, weight_EOI.transpose(1, 2), offs=counts_E.cumsum(0).to(torch.int32))


def runs_grouped(x_MD: Tensor, *weights: Tensor) -> bool:
    """Whether torch's grouped product takes these: bf16 on a GPU since Hopper, rows of whole 16 bytes."""
    if x_MD.device.type != "cuda" or torch.cuda.get_device_capability(x_MD.device) < (9, 0):
        return False
    return all(t.dtype == torch.bfloat16 and t.shape[-1] % 8 == 0 for t in (x_MD, *weights))


def with_balance(losses_BT: Tensor, balances: list[Tensor]) -> Tensor:
    """The losses unchanged, but their gradient also flows into the balance losses [B], as if each token's had those.

    So a balance loss is weighted by the share that its sequence's tokens have in the loss of the step.
    """
    return losses_BT if not balances else _WithBalance.apply(losses_BT, torch.stack(balances).sum(0))


class _WithBalance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses_BT: Tensor, balance_B: Tensor) -> Tensor:
        ctx.dtype = balance_B.dtype
        return losses_BT.view_as(losses_BT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (g_BT,) = gradients
        return g_BT, g_BT.sum(1).to(ctx.dtype)
