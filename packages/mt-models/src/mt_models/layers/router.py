"""The router of a mixture of experts: which experts a token passes through, their weights, and losses of the router's.

It computes in fp32 or wider: a rounded logit may choose another expert. Losses are of whole sequences, [B] each, so
that they do not depend on how a batch is cut; where ranks share sequences, each has its part of a loss, and `shards`
adds up what has to be known of the whole.

Shape suffixes: B batch, T tokens, D model size, E experts, C choices of a token, G groups of experts.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mt_core.parallel.dropout import DropoutKeys, jitter_features
from mt_core.parallel.expert.sequence_shards import WHOLE_SEQUENCES, SequenceShards
from mt_models import config
from mt_models.layers.dropout import ROUTER

LEAST_SUM = 1e-20
"""Added to the sum that sigmoid scores are divided by, which may be 0."""


class AuxLosses:
    """The auxiliary losses of one forward pass, [B] each.

    No list: FSDP2 gives a layer copies of the lists in its arguments, and what is appended to those is lost.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []


class Routing(NamedTuple):
    """Where tokens go."""

    weights_BTC: Tensor
    """Weights of each token's experts, in fp32 or wider."""
    chosen_BTC: Tensor
    """Numbers of its experts, int64."""
    kept_BTC: Tensor | None = None
    """False where an expert is full, and drops the token; None where nothing is dropped."""


class Router(nn.Module):
    """Chooses experts by a projection of each token."""

    def __init__(self, part: config.MoE, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(part.experts, size))
        self.part = part
        self.op: Callable[[Tensor, DropoutKeys, float, int], Tensor] = jitter_features
        self.shards: SequenceShards = WHOLE_SEQUENCES
        self.bias: Tensor | None
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer("bias", torch.zeros(part.experts, dtype=wide) if part.expert_bias else None)
        self.load: Tensor
        self.register_buffer("load", torch.zeros(part.experts, dtype=torch.int64), persistent=False)
        self.entropy: Tensor
        self.register_buffer("entropy", torch.zeros(2, dtype=torch.float64), persistent=False)
        self.dropped: Tensor
        self.register_buffer("dropped", torch.zeros((), dtype=torch.int64), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Move or convert the module; its bias stays in fp32 or wider, since a rounded one may choose other experts."""
        bias = self.bias
        super()._apply(fn, recurse)
        if bias is not None and self.bias is not None and self.bias.itemsize < torch.float32.itemsize:
            self.bias = bias.to(self.bias.device, torch.float32)
        return self

    def forward(self, x_BTD: Tensor, aux_losses: AuxLosses | None = None, keys: DropoutKeys | None = None) -> Routing:
        """Route tokens [B, T, D]; losses of each sequence are appended to `aux_losses`.

        With the layer's dropout keys the features are jittered, if the configuration has them so.
        """
        with torch.autocast(x_BTD.device.type, enabled=False):
            wide = torch.promote_types(x_BTD.dtype, torch.float32)
            x_BTD = x_BTD.to(wide)
            if keys is not None and self.part.jitter:
                x_BTD = self.op(x_BTD, keys, self.part.jitter, ROUTER)
            logits_BTE = F.linear(x_BTD, self.weight.to(wide))
        routing = choose_experts(self.part, logits_BTE, self.bias)
        if self.training:
            routing = self.drop(routing)
            self.count(logits_BTE.detach(), routing)
        if aux_losses is not None and self.part.has_aux_losses:
            loss_B = self.compute_losses(logits_BTE, routing.chosen_BTC)
            aux_losses.losses.append(self.shards.sum_gradient(loss_B))
        return routing

    @torch.no_grad()
    def drop(self, routing: Routing) -> Routing:
        """Drop the tokens of experts that are full, which depends on whole sequences and on nothing else."""
        part = self.part
        if part.capacity_factor is None:
            return routing
        weights_BTC, chosen_BTC = self.shards.gather(routing.weights_BTC), self.shards.gather(routing.chosen_BTC)
        capacity = math.ceil(chosen_BTC.shape[1] * part.top_k / part.experts * part.capacity_factor)
        by_weight = weights_BTC if part.drop_policy == "probability" else None
        kept_BTC = keep_within_capacity(chosen_BTC, by_weight, part.experts, capacity)
        # no `_replace`, whose result Dynamo cannot carry across a graph break
        return Routing(routing.weights_BTC, routing.chosen_BTC, self.shards.take_local(kept_BTC))

    @torch.no_grad()
    def count(self, logits_BTE: Tensor, routing: Routing) -> None:
        """Add up how often each expert is chosen, the entropy of choices and what is dropped, until the step ends.

        A layer that is recomputed counts twice: only ratios within a layer mean something.
        """
        chosen_BTC = routing.chosen_BTC
        if routing.kept_BTC is not None:
            self.dropped += (~routing.kept_BTC).sum()
        self.load += one_hot(chosen_BTC.flatten(), self.part.experts).sum(0)
        entropy = torch.special.entr(compute_probabilities(self.part, logits_BTE)).sum()
        self.entropy += torch.stack((entropy, torch.full_like(entropy, chosen_BTC[..., 0].numel())))

    @torch.no_grad()
    def update_bias(self, load_E: Tensor, finite: Tensor) -> None:
        """Move the bias towards experts that were chosen less often than the mean, in a step of a finite gradient.

        `load_E` are the choices of all ranks in the step (arXiv:2408.15664).
        """
        if self.bias is not None:
            direction_E = (load_E.sum() - self.part.experts * load_E).sign() * finite
            self.bias += self.part.expert_bias_update_rate * direction_E

    def compute_losses(self, logits_BTE: Tensor, chosen_BTC: Tensor) -> Tensor:
        """This rank's part of the balance loss and the z-loss of each sequence, times their coefficients, [B]."""
        part, loss_B = self.part, logits_BTE.new_zeros(len(logits_BTE))
        if part.aux_loss_coeff:
            probabilities_BTE = compute_probabilities(part, logits_BTE)
            loss_B = part.aux_loss_coeff * load_balancing_loss(probabilities_BTE, chosen_BTC, self.shards)
        if part.z_loss_coeff:
            squares_BT = logits_BTE.logsumexp(-1).square()
            loss_B = loss_B + part.z_loss_coeff * squares_BT.mean(1) / self.shards.ranks
        return loss_B


def choose_experts(part: config.MoE, logits_BTE: Tensor, bias_E: Tensor | None = None) -> Routing:
    """Choose each token's experts by their scores, to which a bias may be added for the choice, and weight them.

     The normalised softmax is one over the chosen logits, and groups are then ranked by sums of logits
    ; otherwise scores are computed first.
    """
    after = part.normalized and part.score == "softmax"
    scores_BTE = logits_BTE if after else compute_scores(part, logits_BTE)
    if bias_E is None:
        weights_BTC, chosen_BTC = limit_groups(part, scores_BTE).topk(part.top_k, dim=-1)
    else:
        chosen_BTC = limit_groups(part, scores_BTE.detach() + bias_E).topk(part.top_k, dim=-1).indices
        weights_BTC = scores_BTE.gather(-1, chosen_BTC)
    if after:
        weights_BTC = weights_BTC.softmax(-1)
    elif part.normalized:
        weights_BTC = weights_BTC / (weights_BTC.sum(-1, keepdim=True) + LEAST_SUM)
    return Routing(weights_BTC if part.scaling_factor == 1 else weights_BTC * part.scaling_factor, chosen_BTC)


def keep_within_capacity(chosen_BTC: Tensor, weights_BTC: Tensor | None, experts: int, capacity: int) -> Tensor:
    """Which choices are among the first `capacity` of their expert in their sequence, boolean [B, T, C].

    The first are those of the highest weights, the earlier token of two equal ones; without weights, the earliest.
    """
    chosen_BTE = one_hot(chosen_BTC, experts).any(-2)
    if weights_BTC is not None:
        weights_BTE = weights_BTC.new_full(chosen_BTE.shape, -torch.inf).scatter(-1, chosen_BTC, weights_BTC)
        place_BTE = weights_BTE.argsort(dim=1, descending=True, stable=True).argsort(1)
    else:
        place_BTE = chosen_BTE.cumsum(1) - 1
    return (place_BTE < capacity).gather(-1, chosen_BTC)


def compute_scores(part: config.MoE, logits_BTE: Tensor) -> Tensor:
    """Score every expert."""
    return logits_BTE.softmax(-1) if part.score == "softmax" else logits_BTE.sigmoid()


def compute_probabilities(part: config.MoE, logits_BTE: Tensor) -> Tensor:
    """Score every expert, a token's scores adding up to one."""
    scores_BTE = compute_scores(part, logits_BTE)
    return scores_BTE if part.score == "softmax" else scores_BTE / (scores_BTE.sum(-1, keepdim=True) + LEAST_SUM)


def limit_groups(part: config.MoE, scores_BTE: Tensor) -> Tensor:
    """Leave only the experts of each token's best groups with scores above −∞ (arXiv:2405.04434, §2.2.2)."""
    if part.top_groups is None or part.top_groups == part.groups:
        return scores_BTE
    grouped_BTGE = scores_BTE.unflatten(-1, (part.groups, -1))
    best_BTG = grouped_BTGE.detach().topk(part.group_best, dim=-1).values.sum(-1)
    allowed_BTG = one_hot(best_BTG.topk(part.top_groups, dim=-1).indices, part.groups).any(-2)
    return grouped_BTGE.masked_fill(~allowed_BTG[..., None], -torch.inf).flatten(-2)


def load_balancing_loss(
    probabilities_BTE: Tensor, chosen_BTC: Tensor, shards: SequenceShards = WHOLE_SEQUENCES
) -> Tensor:
    """Σ_e E · (share of choices that fell on e) · (mean probability of e) of each sequence, [B]: 1 when all is even.

    By sequence, not by micro-batch, so that it does not depend on how a batch is cut (arXiv:2405.04434, eq. 12-14).
    Choices are counted on all ranks that share a sequence, and probabilities on this one: the parts add up.
    """
    experts = probabilities_BTE.shape[-1]
    shares_BE = one_hot(chosen_BTC.flatten(1), experts).to(probabilities_BTE.dtype).mean(1)
    shares_BE = shards.sum(shares_BE) / shards.ranks
    return experts * (shares_BE * probabilities_BTE.mean(1)).sum(-1) / shards.ranks


def one_hot(chosen: Tensor, experts: int) -> Tensor:
    """Which expert each choice is, boolean […, E]; unlike `bincount`, it does not wait for the GPU."""
    return chosen[..., None] == torch.arange(experts, device=chosen.device)


def attach_aux_losses(losses_BT: Tensor, aux_losses: AuxLosses) -> Tensor:
    """The losses unchanged, but their gradient also flows into the auxiliary losses, as if each token's had those.

    So an auxiliary loss is weighted by the share that its sequence's tokens have in the loss of the step.
    """
    if not aux_losses.losses:
        return losses_BT
    return _AttachAuxLosses.apply(losses_BT, torch.stack(aux_losses.losses).sum(0))  # pyright: ignore[reportReturnType]


class _AttachAuxLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses_BT: Tensor, aux_B: Tensor) -> Tensor:
        ctx.dtype = aux_B.dtype
        return losses_BT.view_as(losses_BT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (g_BT,) = gradients
        return g_BT, g_BT.sum(1).to(ctx.dtype)
