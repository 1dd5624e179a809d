"""How the next token is chosen from logits: temperature, then top-k or top-p, then one draw.

Source: docs/specs/evaluation.md §4.1.

Choosing is a pure function of the logits and a number in [0, 1), so equal draws give equal tokens in any batch.

Shape suffixes: B sequences, V vocabulary.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mt_core.errors import Problem, raise_if

if TYPE_CHECKING:
    from torch import Tensor

LIKELIEST = (256, 4096)
"""How many tokens are put in order at first, and then for draws that fall on none of them, before all are."""


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """Which tokens may be drawn, and how evenly."""

    temperature: float = 1.0
    """Logits are divided by this first; in (0, 100]."""
    top_k: int = 0
    """Keep this many of the largest logits; 1 always takes the largest, 0 keeps all."""
    top_p: float = 0.0
    """Keep the likeliest tokens up to the first that takes their sum above this; 0 keeps all."""
    top_p_decay: float = 0.0
    """After every new token, `top_p` is multiplied by this; 0 leaves it as it is."""
    top_p_bound: float = 0.0
    """What decay does not take `top_p` below."""

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.temperature <= 100:
            allowed = "above 0, at most 100 (--top-k 1 always takes the likeliest token)"
            problems.append(Problem("--temperature", f"{self.temperature}", allowed))
        if self.top_k < 0:
            problems.append(Problem("--top-k", f"{self.top_k}", "0 (off) or more"))
        if not 0 <= self.top_p <= 1:
            problems.append(Problem("--top-p", f"{self.top_p}", "0 (off) to 1"))
        if self.top_k and self.top_p:
            problems.append(Problem("--top-k, --top-p", "both set", "one of the two"))
        problems += self._check_decay()
        raise_if(problems)

    def _check_decay(self) -> Iterator[Problem]:
        if not 0 <= self.top_p_decay <= 1:
            yield Problem("--top-p-decay", f"{self.top_p_decay}", "0 (off) to 1")
        elif self.top_p_decay and not self.top_p:
            yield Problem("--top-p-decay", "there is no top_p that could decay", "give --top-p too")
        if not 0 <= self.top_p_bound <= max(self.top_p, 0):
            yield Problem("--top-p-bound", f"{self.top_p_bound}", f"0 to --top-p, which is {self.top_p}")
        elif self.top_p_bound and not self.top_p_decay:
            yield Problem("--top-p-bound", "nothing decays", "give --top-p-decay too")

    def after(self, new_tokens: int) -> "SamplingOptions":
        """The options for the token that follows so many new ones."""
        if not self.top_p_decay:
            return self
        decayed = max(self.top_p * self.top_p_decay**new_tokens, self.top_p_bound, sys.float_info.min)
        return replace(self, top_p=decayed, top_p_decay=0.0, top_p_bound=0.0)

    @property
    def greedy(self) -> bool:
        """No draw is needed."""
        return self.top_k == 1


def choose_each(logits_BV: "Tensor", options: Sequence[SamplingOptions], draws: Sequence[float]) -> list[int]:
    """One token for each row of logits [B, V], by the row's own options."""
    import torch

    draws_B = torch.tensor(draws, dtype=torch.float64, device=logits_BV.device)
    chosen_B = torch.empty(len(draws), dtype=torch.int64, device=logits_BV.device)
    for each in set(options):
        rows = [row for row, option in enumerate(options) if option == each]
        chosen_B[rows] = choose_tokens(logits_BV[rows], each, draws_B[rows])
    return chosen_B.tolist()


def choose_tokens(logits_BV: "Tensor", options: SamplingOptions, draws_B: "Tensor") -> "Tensor":
    """Token ids [B] for draws in [0, 1), fp64. Equal logits are ordered by id, the lower first."""
    import torch

    if options.greedy:
        return logits_BV.argmax(-1)
    chosen_B = torch.empty(len(logits_BV), dtype=torch.int64, device=logits_BV.device)
    rest_N = torch.arange(len(logits_BV), device=logits_BV.device)
    for count in (options.top_k,) if options.top_k else LIKELIEST:
        if len(rest_N) and 2 * count < logits_BV.shape[-1]:
            chosen_B[rest_N], certain_N = choose_likeliest(logits_BV[rest_N], options, draws_B[rest_N], count)
            rest_N = rest_N[~certain_N]
    if len(rest_N):
        chosen_B[rest_N] = choose_sorted(logits_BV[rest_N], options, draws_B[rest_N])
    return chosen_B


def choose_sorted(logits_BV: "Tensor", options: SamplingOptions, draws_B: "Tensor") -> "Tensor":
    """What `choose_tokens` gives, from the whole vocabulary in order of probability: the definition, and slow."""
    import torch

    sorted_BV, ids_BV = logits_BV.double().div(options.temperature).sort(dim=-1, descending=True, stable=True)
    probs_BV = sorted_BV.softmax(-1)
    if options.top_k:
        probs_BV[:, options.top_k :] = 0
    if options.top_p:
        above_BV = probs_BV.cumsum(-1) > options.top_p
        probs_BV[:, 1:].masked_fill_(above_BV[:, :-1], 0)
    below_BV = probs_BV.cumsum(-1)
    picked_B = (below_BV <= draws_B[:, None] * below_BV[:, -1:]).sum(-1)
    picked_B = torch.minimum(picked_B, (probs_BV > 0).sum(-1) - 1)  # a draw rounded up to 1 stays inside
    return ids_BV.gather(-1, picked_B[:, None])[:, 0]


def choose_likeliest(
    logits_BV: "Tensor", options: SamplingOptions, draws_B: "Tensor", count: int
) -> "tuple[Tensor, Tensor]":
    """Token ids [B] from the `count` likeliest tokens only, and whether each is what the whole vocabulary gives [B].

    It is where the draw falls on one of them, and no comparison is so close that rounding could have decided it. Sums
    of V weights are off by at most (V + 1000) 2^-52 of the whole, here and in `choose_sorted`: V for as many additions,
    1000 for exponents, which are above -746 where their weight is not 0.
    """
    margin = (logits_BV.shape[-1] + 1000) * 2.0**-50
    ids_BK = logits_BV.topk(count + 1, dim=-1, sorted=False).indices.sort(-1).values
    scaled_BK = logits_BV.gather(-1, ids_BK).double().div(options.temperature)
    scaled_BK, order_BK = scaled_BK.sort(dim=-1, descending=True, stable=True)
    ids_BK = ids_BK.gather(-1, order_BK)
    complete_BK = scaled_BK > scaled_BK[:, -1:]  # of those equal to the last, others may be missing
    weights_BK = (scaled_BK - scaled_BK[:, :1]).exp().where(complete_BK, 0)
    below_BK = weights_BK.cumsum(-1)
    if options.top_k:
        total_B1, certain_B = below_BK[:, -1:], complete_BK[:, -2]
    else:
        scaled_BV = logits_BV.double().div(options.temperature).sub_(scaled_BK[:, :1])
        total_B1, certain_B = scaled_BV.exp_().sum(-1, keepdim=True), complete_BK[:, 0]
    kept_B1 = total_B1
    if options.top_p:
        threshold_B1 = options.top_p * total_B1
        above_BK = below_BK > threshold_B1
        certain_B = certain_B & above_BK[:, -1] & ((below_BK - threshold_B1).abs() > margin * total_B1).all(-1)
        weights_BK[:, 1:].masked_fill_(above_BK[:, :-1], 0)
        below_BK = weights_BK.cumsum(-1)
        kept_B1 = below_BK[:, -1:]
    target_B1 = draws_B[:, None] * kept_B1
    certain_B = certain_B & (target_B1 < below_BK[:, -1:])[:, 0]
    certain_B &= ((below_BK - target_B1).abs() > margin * total_B1).all(-1)
    picked_B1 = (below_BK <= target_B1).sum(-1, keepdim=True).clamp_(max=count)
    return ids_BK.gather(-1, picked_B1)[:, 0], certain_B
