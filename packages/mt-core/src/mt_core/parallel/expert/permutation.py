"""Permutations of rows: tokens to the order of their experts and back, with gradients that are gathered, not added up.

`permute` takes each token once for each expert that it chose, `unpermute` adds up what came of those rows. Neither uses
atomic sums, so results are the same bits every time. On a GPU each is one Triton kernel instead of several of torch's,
unless torch.compile fuses those.

Rows of an expert may be filled up to a fixed number with those of one more token, which is all zeros: a sum over rows
that belong to no token of the caller's is cut off, and with it every gradient of theirs.

Shape suffixes: D model size, N tokens, C choices of a token, M = N·C choices, R rows of those that are kept, at most M
but for padding, E experts, e those of this rank, n ranks.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Permutation(NamedTuple):
    """An order of the choices of tokens, and the inverse order; choice m is one of token m // C."""

    order_M: Tensor
    """The choice that stands at each position, int64."""
    back_M: Tensor
    """The position of each choice, int64."""
    padded: bool = False
    """Whether the choices are those of one token more, whose features are zeros and whose rows are padding."""


def sort_choices(
    chosen_NC: Tensor, kept_NC: Tensor | None, experts: int, rows: int | None = None
) -> tuple[Permutation, Tensor]:
    """Return the order of choices by expert, and the number of rows of each expert, [E].

    Choices that are not kept stand behind those of the last expert, and count for none. With `rows`, which no expert
    may have more of, each has exactly so many, and the host waits for nothing.
    """
    chosen_M = chosen_NC.flatten()
    if kept_NC is not None:
        chosen_M = chosen_M.where(kept_NC.flatten(), experts)
    counts_E = (chosen_M[:, None] == torch.arange(experts, device=chosen_M.device)).sum(0)
    permutation = make_permutation(chosen_M.argsort(stable=True))
    if rows is None:
        return permutation, counts_E
    return _pad(permutation, chosen_M, counts_E, rows, chosen_NC.shape[1]), torch.full_like(counts_E, rows)


def _pad(permutation: Permutation, chosen_M: Tensor, counts_E: Tensor, rows: int, choices: int) -> Permutation:
    """Return the order in which each expert has so many rows; positions past the last are of choices without a row."""
    total = rows * len(counts_E)
    skipped_E = torch.arange(len(counts_E), device=chosen_M.device) * rows - (counts_E.cumsum(0) - counts_E)
    position_M = permutation.back_M + F.pad(skipped_E, (0, 1))[chosen_M]
    back_M = F.pad(position_M.where(chosen_M < len(counts_E), total), (0, choices), value=total)
    order_R = back_M.new_full((total + 1,), len(chosen_M))
    order_R[back_M[: len(chosen_M)]] = torch.arange(len(chosen_M), device=chosen_M.device)
    return Permutation(order_R[:total], back_M, padded=True)


def sort_by_expert(counts_ne: Tensor, rows: int) -> Permutation:
    """Return the order that sorts rows by expert which are sorted by rank, and within a rank by expert."""
    experts = torch.arange(counts_ne.shape[1], device=counts_ne.device).repeat(counts_ne.shape[0])
    return make_permutation(experts.repeat_interleave(counts_ne.flatten(), output_size=rows).argsort(stable=True))


def make_permutation(order_M: Tensor) -> Permutation:
    """Return an order with its inverse."""
    positions_M = torch.arange(len(order_M), device=order_M.device)
    return Permutation(order_M, torch.empty_like(order_M).scatter_(0, order_M, positions_M))


def permute(x_ND: Tensor, permutation: Permutation, rows: int | None = None) -> Tensor:
    """Return the features of the token of each choice, in the order of the permutation, [R, D]; the first `rows`."""
    order_M, back_M, padded = permutation
    rows = len(order_M) if rows is None else rows
    x_ND = F.pad(x_ND, (0, 0, 0, 1)) if padded else x_ND
    return _Permute.apply(x_ND, order_M, back_M, rows)  # pyright: ignore[reportReturnType]


def unpermute(y_RD: Tensor, permutation: Permutation, weights_NC: Tensor) -> Tensor:
    """Return the sum of each token's rows times their weights, [N, D]; choices without a row add nothing."""
    order_M, back_M, padded = permutation
    if not padded:
        return _Unpermute.apply(y_RD, order_M, back_M, weights_NC)  # pyright: ignore[reportReturnType]
    y_ND: Any = _Unpermute.apply(y_RD, order_M, back_M, F.pad(weights_NC, (0, 0, 0, 1)))
    return y_ND[:-1]


def restore(y_MD: Tensor, permutation: Permutation) -> Tensor:
    """Return rows to where `permute` took them from, where each token had one choice."""
    return permute(y_MD, Permutation(permutation.back_M, permutation.order_M))


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_M: Tensor, back_M: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(back_M)
        ctx.tokens = len(x_ND)
        return choose_operations(x_ND).gather_tokens(x_ND, order_M[:rows], len(back_M), None)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (back_M,) = ctx.saved_tensors
        g_RD = gradients[0]
        return choose_operations(g_RD).add_choices(g_RD, back_M, ctx.tokens, None), None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, order_M: Tensor, back_M: Tensor, weights_NC: Tensor) -> Tensor:
        ctx.save_for_backward(y_RD, order_M, back_M, weights_NC)
        return choose_operations(y_RD).add_choices(y_RD, back_M, len(weights_NC), weights_NC)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, Tensor]:
        y_RD, order_M, back_M, weights_NC = ctx.saved_tensors
        (g_ND,) = gradients
        operations = choose_operations(g_ND)
        g_RD = operations.gather_tokens(g_ND, order_M[: len(y_RD)], len(back_M), weights_NC)
        products_M = operations.multiply_choices(y_RD, back_M, g_ND)
        return g_RD, None, None, products_M.view_as(weights_NC).to(weights_NC.dtype)


def gather_tokens(x_ND: Tensor, order_R: Tensor, choices: int, weights_NC: Tensor | None = None) -> Tensor:
    """Return the features of the token of each choice in `order`, of all M = `choices`, times the choice's weight."""
    x_RD = x_ND[order_R // max(choices // max(len(x_ND), 1), 1)]
    return x_RD if weights_NC is None else x_RD * weights_NC.flatten()[order_R, None].to(x_RD.dtype)


def add_choices(y_RD: Tensor, back_M: Tensor, tokens: int, weights_NC: Tensor | None = None) -> Tensor:
    """Return the sum over each token's choices of their rows, times their weights."""
    y_NCD = take_choices(y_RD, back_M).view(tokens, -1 if tokens else 1, y_RD.shape[1])
    return (y_NCD if weights_NC is None else y_NCD * weights_NC[..., None].to(y_NCD.dtype)).sum(1)


def multiply_choices(y_RD: Tensor, back_M: Tensor, g_ND: Tensor) -> Tensor:
    """Return the inner product of the row of each choice and `g` of its token, [M], summed up in fp32 or wider."""
    y_NCD = take_choices(y_RD, back_M).view(len(g_ND), -1 if len(g_ND) else 1, y_RD.shape[1])
    return (y_NCD * g_ND[:, None]).sum(-1, dtype=torch.promote_types(g_ND.dtype, torch.float32)).flatten()


def take_choices(y_RD: Tensor, back_M: Tensor) -> Tensor:
    """Return the row of each choice, zeros for those without."""
    return F.pad(y_RD, (0, 0, 0, 1))[back_M.clamp(max=len(y_RD))]


class Operations(NamedTuple):
    """One form of what permutations are made of."""

    gather_tokens: Callable[[Tensor, Tensor, int, Tensor | None], Tensor]
    add_choices: Callable[[Tensor, Tensor, int, Tensor | None], Tensor]
    multiply_choices: Callable[[Tensor, Tensor, Tensor], Tensor]


PLAIN = Operations(gather_tokens, add_choices, multiply_choices)


def choose_operations(x: Tensor) -> Operations:
    """Return Triton's kernels for a tensor on a GPU, or the plain form, which torch.compile fuses itself."""
    return PLAIN if torch.compiler.is_compiling() or not x.is_cuda else _import_kernels()


@cache
def _import_kernels() -> Operations:
    if find_spec("triton") is None:
        return PLAIN
    from mt_core.parallel.expert.fused_permutation import add_choices, gather_tokens, multiply_choices

    return Operations(gather_tokens, add_choices, multiply_choices)
