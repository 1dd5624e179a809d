"""The router of a mixture of experts: which experts a token passes through, and their weights.

It computes in fp32 or wider: a rounded logit may choose another expert. Where ranks share sequences, `shards` adds up
what has to be known of the whole.

Shape suffixes: B batch, T tokens, D model size, E experts, C choices of a token, G groups of experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mt_core.parallel.dropout import DropoutKeys, jitter_features
from mt_core.parallel.expert.dispatcher import Capacity
from mt_core.parallel.expert.sequence_shards import WHOLE_SEQUENCES, SequenceShards
from mt_models import config
from mt_models.layers.choices import (
    compute_capacity,
    compute_full_capacity,
    count_choices,
    keep_within_capacity,
    leave_out_padding,
    one_hot,
)
from mt_models.layers.dropout import ROUTER
from mt_models.layers.router_losses import RoutingRecord, load_balancing_loss, z_loss

LEAST_SUM = 1e-20
"""Added to the sum that sigmoid scores are divided by, which may be 0."""


class Routing(NamedTuple):
    """Where tokens go."""

    weights_BTC: Tensor
    """Weights of each token's experts, in fp32 or wider."""
    chosen_BTC: Tensor
    """Numbers of its experts, int64."""
    kept_BTC: Tensor | None = None
    """False where a token is padding or its expert is full, and drops it; None where all are kept."""


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

    def forward(self, x_BTD: Tensor, record: RoutingRecord | None = None, keys: DropoutKeys | None = None) -> Routing:
        """Route tokens [B, T, D]; in training the router's losses are left in the layer's record.

        With the layer's dropout keys the features are jittered, if the configuration has them so.
        """
        with torch.autocast(x_BTD.device.type, enabled=False):
            wide = torch.promote_types(x_BTD.dtype, torch.float32)
            x_BTD = x_BTD.to(wide)
            if keys is not None and self.part.jitter:
                x_BTD = self.op(x_BTD, keys, self.part.jitter, ROUTER)
            logits_BTE = F.linear(x_BTD, self.weight.to(wide))
        mask_BT = None
        if record is not None and record.padding_mask_BT is not None:
            mask_BT = self.shards.take_tensor_part(record.padding_mask_BT) != 0
        routing = self.leave_out(choose_experts(self.part, logits_BTE, self.bias), mask_BT)
        if self.training:
            self.observe(logits_BTE, routing, mask_BT, record)
        return routing

    @torch.no_grad()
    def leave_out(self, routing: Routing, mask_BT: Tensor | None) -> Routing:
        """Leave out padding, and in training drop the tokens of experts that are full, which depends on whole sequences
        and on nothing else."""
        part = self.part
        chosen_BTC = leave_out_padding(routing.chosen_BTC, mask_BT, part.experts)
        if part.capacity_factor is not None and self.training:
            chosen_BTC, by_weight = self.shards.gather(chosen_BTC), part.drop_policy == "probability"
            weights_BTC = self.shards.gather(routing.weights_BTC) if by_weight else None
            capacity_B = compute_capacity(chosen_BTC, part.experts, part.capacity_factor)
            kept_BTC = keep_within_capacity(chosen_BTC, weights_BTC, part.experts, capacity_B)
            kept_BTC = self.shards.take_local(kept_BTC)
        elif mask_BT is not None:
            kept_BTC = chosen_BTC < part.experts
        else:
            return routing
        # no `_replace`, whose result Dynamo cannot carry across a graph break
        return Routing(routing.weights_BTC, routing.chosen_BTC, kept_BTC)

    def get_padding(self, routing: Routing) -> Capacity | None:
        """To how many rows those of every expert are padded; None in evaluation, and without `pad_to_capacity`."""
        part, (sequences, tokens, choices) = self.part, routing.chosen_BTC.shape
        if not part.pad_to_capacity or part.capacity_factor is None or not self.training:
            return None
        whole = tokens * self.shards.ranks
        return Capacity(sequences, compute_full_capacity(whole, choices, part.experts, part.capacity_factor))

    def observe(
        self, logits_BTE: Tensor, routing: Routing, mask_BT: Tensor | None, record: RoutingRecord | None
    ) -> None:
        """Count choices, once in a forward pass although layers are recomputed, and leave losses in the record."""
        experts = self.part.experts
        first = record is None or not record.counted
        counts_BE = count_choices(leave_out_padding(routing.chosen_BTC, mask_BT, experts), experts)
        if first:
            self.count(logits_BTE.detach(), counts_BE, routing, mask_BT)
        if record is None:
            return
        record.counted = True
        if self.part.has_aux_losses:
            if first:
                self.share_choices(counts_BE, record)
            record.loss_B = self.shards.sum_gradient(self.compute_losses(logits_BTE, mask_BT, record))

    @torch.no_grad()
    def count(self, logits_BTE: Tensor, counts_BE: Tensor, routing: Routing, mask_BT: Tensor | None) -> None:
        """Add up how often each expert is chosen, the entropy of choices and what is dropped, until the step ends."""
        choices = counts_BE.sum()
        if routing.kept_BTC is not None:
            self.dropped += choices - routing.kept_BTC.sum()
        self.load += counts_BE.sum(0)
        entropy_BT = torch.special.entr(compute_probabilities(self.part, logits_BTE)).sum(-1)
        entropy = entropy_BT.sum() if mask_BT is None else entropy_BT.where(mask_BT, 0).sum()
        self.entropy += torch.stack((entropy.double(), choices / self.part.top_k))

    @torch.no_grad()
    def share_choices(self, counts_BE: Tensor, record: RoutingRecord) -> None:
        """Leave in the record the share of choices on each expert, in what the balance loss evens out.

        In the global batch that is the step so far: its later micro-batches are not known yet.
        """
        counts_BE = self.shards.sum(counts_BE)
        record.tokens_B = counts_BE.sum(1) // self.part.top_k
        if self.part.aux_loss_scope == "micro_batch":
            counts_BE = counts_BE.sum(0, keepdim=True)
        elif self.part.aux_loss_scope == "global_batch":
            counts_BE = self.shards.sum_step(self.load)[None]
        record.shares_BE = counts_BE.double() / counts_BE.sum(1, keepdim=True).clamp(min=1)

    @torch.no_grad()
    def update_bias(self, load_E: Tensor, finite: Tensor) -> None:
        """Move the bias towards experts that were chosen less often than the mean, in a step of a finite gradient.

        `load_E` are the choices of all ranks in the step (arXiv:2408.15664).
        """
        if self.bias is not None:
            direction_E = (load_E.sum() - self.part.experts * load_E).sign() * finite
            self.bias += self.part.expert_bias_update_rate * direction_E

    def compute_losses(self, logits_BTE: Tensor, mask_BT: Tensor | None, record: RoutingRecord) -> Tensor:
        """This rank's part of the balance loss and the z-loss of each sequence, times their coefficients, [B]."""
        part, tokens_B, loss_B = self.part, record.tokens_B, logits_BTE.new_zeros(len(logits_BTE))
        assert tokens_B is not None
        assert record.shares_BE is not None
        if part.aux_loss_coeff:
            probabilities_BTE = compute_probabilities(part, logits_BTE)
            loss_B = part.aux_loss_coeff * load_balancing_loss(probabilities_BTE, record.shares_BE, tokens_B, mask_BT)
        return loss_B + part.z_loss_coeff * z_loss(logits_BTE, tokens_B, mask_BT) if part.z_loss_coeff else loss_B


def choose_experts(part: config.MoE, logits_BTE: Tensor, bias_E: Tensor | None = None) -> Routing:
    """Choose each token's experts by their scores, to which a bias may be added for the choice, and weight them.

    The normalised softmax is one over the chosen logits, and groups are then ranked by sums of logits; otherwise
    scores are computed first.
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
