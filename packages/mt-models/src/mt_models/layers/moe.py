"""A mixture of experts: a router sends each token through `top_k` of E gated feed-forward layers (arXiv:2101.03961).

The router computes in fp32 or wider: a rounded logit may choose another expert. Experts run in a loop, each on the
tokens that chose it, or on a GPU in bf16 as one grouped matrix product. Where they are is the business of `Experts.op`.

Shape suffixes: B batch, T tokens, D model size, E experts, F hidden features, N = B·T tokens, C choices of a token,
M = N·C tokens in the order of their experts.
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mt_core.parallel.expert.dispatcher import Dispatch, dispatch
from mt_core.parallel.expert.permutation import invert_permutation, permute
from mt_core.parallel.tensor.plan import used_elsewhere
from mt_models import config
from mt_models.config.mlp import GATE_UP
from mt_models.fusion import stack_parts
from mt_models.layers.basic import Linear


class AuxLosses:
    """The auxiliary losses of one forward pass, [B] each.

    No list: FSDP2 gives a layer copies of the lists in its arguments, and what is appended to those is lost.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []


class ExpertWeights(nn.Module):
    """A weight for each expert."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.op = used_elsewhere


class Experts(nn.Module):
    """Gated feed-forward layers; gate and up are one weight [E, 2, F, D]."""

    fusions = MappingProxyType({"gate_up.weight": stack_parts(GATE_UP, dim=1)})

    def __init__(self, part: config.MoE, size: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_up = ExpertWeights(part.experts, 2, part.ffn_hidden_size, size)
        self.down = ExpertWeights(part.experts, size, part.ffn_hidden_size)
        self.activation = activation
        self.op: Dispatch = dispatch

    def forward(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        """[M, D] to the same shape; the first counts[0] rows are the first expert's, and so on."""
        return self.op(x_MD, counts_E, self.feed)

    def feed(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        """[M, D] to the same shape, for rows whose experts are all on this rank."""
        multiply = multiply_grouped if runs_grouped(x_MD, self.gate_up.weight, self.down.weight) else multiply_looped
        gate_MF, up_MF = multiply(x_MD, self.gate_up.weight.flatten(1, 2), counts_E).chunk(2, -1)
        return multiply(self.activation(gate_MF) * up_MF, self.down.weight, counts_E)


class MoE(nn.Module):
    """The sum of a token's experts, weighted by its router."""

    def __init__(self, part: config.MoE, size: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.router = Linear(size, part.experts)
        self.experts = Experts(part, size, activation)
        self.part = part

    def forward(self, x_BTD: Tensor, aux_losses: AuxLosses | None = None) -> Tensor:
        """[B, T, D] to the same shape; the balance loss of each sequence, [B], is appended to `aux_losses`."""
        with torch.autocast(x_BTD.device.type, enabled=False):
            wide = torch.promote_types(x_BTD.dtype, torch.float32)
            logits_BTE = F.linear(x_BTD.to(wide), self.router.weight.to(wide))
        weights_BTC, chosen_BTC = topk_routing(logits_BTE, self.part.top_k, normalized=self.part.normalized)
        if aux_losses is not None and self.part.aux_loss_coeff:
            aux_losses.losses.append(self.part.aux_loss_coeff * load_balancing_loss(logits_BTE, chosen_BTC))
        chosen_M = chosen_BTC.flatten()
        order_M = chosen_M.argsort(stable=True)
        back_M = invert_permutation(order_M)
        x_MD = permute_tokens(x_BTD.flatten(0, 1), order_M, back_M)
        y_MD = permute(self.experts(x_MD, one_hot(chosen_M, self.part.experts).sum(0)), back_M, order_M)
        y_BTCD = y_MD.view(*chosen_BTC.shape, -1)
        return (y_BTCD * weights_BTC[..., None].to(y_BTCD.dtype)).sum(2)


def topk_routing(logits_BTE: Tensor, top_k: int, *, normalized: bool) -> tuple[Tensor, Tensor]:
    """Weights and numbers of each token's experts, [B, T, C]: a softmax over the chosen logits or over all."""
    if normalized:
        highest_BTC, chosen_BTC = logits_BTE.topk(top_k, dim=-1)
        return highest_BTC.softmax(-1), chosen_BTC
    return logits_BTE.softmax(-1).topk(top_k, dim=-1)


def permute_tokens(x_ND: Tensor, order_M: Tensor, back_M: Tensor) -> Tensor:
    """Each token's features for each of its choices, choice `order[0]` first; choice m is one of token m // C.

    `back` is the inverse order: with it, gradients are gathered and added up in a fixed order, without atomic sums.
    """
    return _PermuteTokens.apply(x_ND, order_M, back_M)  # pyright: ignore[reportReturnType]


class _PermuteTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_M: Tensor, back_M: Tensor) -> Tensor:
        ctx.save_for_backward(back_M)
        ctx.tokens = len(x_ND)
        return x_ND[order_M // (len(order_M) // len(x_ND))]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (back_M,) = ctx.saved_tensors
        return gradients[0][back_M].unflatten(0, (ctx.tokens, -1)).sum(1), None, None


def load_balancing_loss(logits_BTE: Tensor, chosen_BTC: Tensor) -> Tensor:
    """Σ_e E · (share of choices that fell on e) · (mean probability of e) of each sequence, [B]: 1 when all is even.

    By sequence, not by micro-batch, so that it does not depend on how a batch is cut (arXiv:2405.04434, eq. 12-14).
    """
    experts = logits_BTE.shape[-1]
    shares_BE = one_hot(chosen_BTC.flatten(1), experts).to(logits_BTE.dtype).mean(1)
    return experts * (shares_BE * logits_BTE.softmax(-1).mean(1)).sum(-1)


def one_hot(chosen: Tensor, experts: int) -> Tensor:
    """Which expert each choice is, boolean […, E]; unlike `bincount`, it does not wait for the GPU."""
    return chosen[..., None] == torch.arange(experts, device=chosen.device)


def multiply_looped(x_MI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """Each expert's rows times its weight, one expert after the other."""
    parts = x_MI.split(counts_E.tolist())
    return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weight_EOI, strict=True)])


def multiply_grouped(x_MI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """Each expert's rows times its weight, in one kernel, which needs no counts on the host."""
    return F.grouped_mm(x_MI, weight_EOI.transpose(1, 2), offs=counts_E.cumsum(0).to(torch.int32))


def runs_grouped(x_MD: Tensor, *weights: Tensor) -> bool:
    """Whether torch's grouped product takes these: some rows, in bf16 on a GPU since Hopper, of whole 16 bytes."""
    if x_MD.device.type != "cuda" or not len(x_MD) or torch.cuda.get_device_capability(x_MD.device) < (9, 0):
        return False
    return all(t.dtype == torch.bfloat16 and t.shape[-1] % 8 == 0 for t in (x_MD, *weights))


def attach_aux_losses(losses_BT: Tensor, aux_losses: AuxLosses) -> Tensor:
    """The losses unchanged, but their gradient also flows into the balance losses, as if each token's had those.

    So a balance loss is weighted by the share that its sequence's tokens have in the loss of the step.
    """
    if not aux_losses.losses:
        return losses_BT
    return _AttachAuxLosses.apply(losses_BT, torch.stack(aux_losses.losses).sum(0))  # pyright: ignore[reportReturnType]


class _AttachAuxLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses_BT: Tensor, balance_B: Tensor) -> Tensor:
        ctx.dtype = balance_B.dtype
        return losses_BT.view_as(losses_BT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (g_BT,) = gradients
        return g_BT, g_BT.sum(1).to(ctx.dtype)
