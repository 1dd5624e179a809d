"""Token dispatchers: what carries tokens to their experts, on this rank or on others, and the results back.

Every rank of the expert axis has an equal, contiguous part of the experts. Either rows travel, each to the rank of its
expert (arXiv:2006.16668), or every rank gets all tokens and its experts' part of each result is summed over ranks.
`send` and `run` are two steps, so that a layer can do other work while bytes travel.

Shape suffixes: D model size, N tokens, G those of all n ranks, C choices of a token, E experts, e those of this rank,
M = N·C rows in the order of their experts, R rows that reach this rank's experts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mt_core.config.sections import TokenDispatcherName
from mt_core.distributed.mesh import Axis
from mt_core.parallel.expert.exchange import Exchange, make_all_gather, make_all_to_all, read_async
from mt_core.parallel.expert.permutation import Permutation, permute, restore, sort_by_expert, sort_choices, unpermute
from mt_core.parallel.tensor.collectives import (
    all_gather,
    all_gather_async,
    copy_to_tensor_parallel,
    reduce_from_tensor_parallel,
    reduce_scatter,
)

Experts = Callable[[Tensor, Tensor, Sequence[int] | None], Tensor]
"""Local experts: maps rows [R, D] in the order of their experts, and the number of rows of each, to as many rows. The
last argument are those numbers on the host, where it has them."""


class Capacity(NamedTuple):
    """How many rows every expert gets, whatever is chosen; what is missing is padding."""

    sequences: int
    """Sequences that the tokens are of."""
    tokens: int
    """Tokens of a whole sequence that an expert takes at most."""

    def count_rows(self, tokens: int) -> int:
        """The rows of an expert for so many tokens: of each sequence all of them, but no more than it takes."""
        return self.sequences * min(self.tokens, tokens // self.sequences) if tokens else 0


class Choices(NamedTuple):
    """Where tokens go."""

    weights_NC: Tensor
    """Weights of each token's experts."""
    chosen_NC: Tensor
    """Numbers of its experts among all of the layer, int64."""
    kept_NC: Tensor | None
    """False where an expert drops the token; None where nothing is dropped."""
    experts: int
    """All experts of the layer, on whatever rank."""
    capacity: Capacity | None = None
    """If given, every expert gets as many rows as that says, padding among them."""

    def count_rows(self) -> int | None:
        """The rows of an expert for these tokens, or None where that depends on what they choose."""
        return None if self.capacity is None else self.capacity.count_rows(len(self.chosen_NC))


class Sent(NamedTuple):
    """Tokens on their way to their experts, and what takes the results back."""

    x: Tensor
    """Rows for local experts; or what stands for them while they travel."""
    weights_NC: Tensor
    permutation: Permutation
    counts: Tensor
    """Rows of each local expert [e]; or of each rank and local expert [n, e]."""
    exchange: Exchange | None = None
    """What brings rows or tokens of other ranks."""
    sizes: tuple[tuple[int, ...], ...] = ()
    """Rows that go to each rank, and rows that come from each, where those are exchanged."""
    rows: tuple[int, ...] | None = None
    """Rows of each local expert, where the host has them."""


class TokenDispatcher(Protocol):
    """Passes tokens through their experts."""

    def send(self, x_ND: Tensor, choices: Choices) -> Sent:
        """Begin to bring each token to its experts."""
        ...

    def run(self, sent: Sent, experts: Experts) -> Tensor:
        """Pass what arrives through the local experts; return the weighted sum of each token's experts, [N, D]."""
        ...


@dataclass(frozen=True, slots=True)
class LocalDispatcher:
    """Takes tokens to experts that are all on this rank."""

    def send(self, x_ND: Tensor, choices: Choices) -> Sent:
        """Sort tokens by expert; the host waits for their number only where some are dropped and nothing is padded."""
        permutation, counts_E = sort_choices(choices.chosen_NC, choices.kept_NC, choices.experts, choices.count_rows())
        rows = None if choices.kept_NC is None or permutation.padded else int(counts_E.sum())
        return Sent(permute(x_ND, permutation, rows), choices.weights_NC, permutation, counts_E)

    def run(self, sent: Sent, experts: Experts) -> Tensor:
        """Pass rows through their experts, and add up those of each token."""
        return unpermute(experts(sent.x, sent.counts, None), sent.permutation, sent.weights_NC)


@dataclass(frozen=True, slots=True)
class AllToAllDispatcher:
    """Sends each row to the rank that has its expert, in one exchange of uneven parts, and the result back in another.

    Counts go first, since they say how many rows a rank gets from each other; a rank may get none. Where experts get
    equally many rows, padding among them, parts are equal and no counts go.
    """

    axis: Axis
    traceable: ClassVar[bool] = False

    def send(self, x_ND: Tensor, choices: Choices) -> Sent:
        """Begin to send rows; the host waits for the counts, if there are any, while rows are sorted."""
        rows = choices.count_rows()
        permutation, counts_E = sort_choices(choices.chosen_NC, choices.kept_NC, choices.experts, rows)
        received_ne, read = self._exchange_counts(counts_E.view(self.axis.size, -1), rows)
        x_MD = permute(x_ND, permutation)
        leaving, coming = read()
        there, here = (tuple(map(sum, parts)) for parts in (leaving, coming))
        exchange = make_all_to_all(self.axis, there, here)
        token = exchange.begin(x_MD if sum(there) == len(x_MD) else x_MD[: sum(there)])
        by_expert = tuple(map(sum, zip(*coming, strict=True)))
        return Sent(token, choices.weights_NC, permutation, received_ne, exchange, (there, here), by_expert)

    def _exchange_counts(self, counts_ne: Tensor, rows: int | None) -> tuple[Tensor, Callable[[], list[Any]]]:
        """Return the rows that come from each rank for each local expert, and a function that returns on the host the
        rows that go, [n, e], and those that come."""
        if rows is not None:
            known = [[rows] * counts_ne.shape[1]] * self.axis.size
            return counts_ne, lambda: [known, known]
        received_ne = torch.empty_like(counts_ne)
        dist.all_to_all_single(received_ne, counts_ne.contiguous(), group=self.axis.group)
        return received_ne, read_async(torch.stack((counts_ne, received_ne)))

    def run(self, sent: Sent, experts: Experts) -> Tensor:
        """Sort what came by expert, pass it through the experts and send the results back."""
        assert sent.exchange is not None
        there, here = sent.sizes
        by_expert = sort_by_expert(sent.counts, sum(here))
        x_RD = permute(sent.exchange.finish(sent.x), by_expert)
        y_RD = restore(experts(x_RD, sent.counts.sum(0), sent.rows), by_expert)
        y_MD = make_all_to_all(self.axis, here, there)(y_RD)
        return unpermute(y_MD, sent.permutation, sent.weights_NC)


@dataclass(frozen=True, slots=True)
class AllGatherDispatcher:
    """Gives every rank the tokens of all, and sums what their experts return.

    Ranks must have equally many tokens, which the training loop makes sure of: here it would take one more
    collective.
    """

    axis: Axis
    traceable: ClassVar[bool] = False

    def send(self, x_ND: Tensor, choices: Choices) -> Sent:
        """Begin to gather tokens, and sort the choices of local experts; the host waits for their number unless it is
        padded."""
        exchange = make_all_gather(self.axis)
        token = exchange.begin(x_ND)
        weights_GC = all_gather(choices.weights_NC, self.axis, 0)
        chosen_NC, kept_NC = choices.chosen_NC, choices.kept_NC
        if kept_NC is not None:
            chosen_NC = chosen_NC.where(kept_NC, choices.experts)
        local = choices.experts // self.axis.size
        chosen_GC = all_gather_async(chosen_NC, self.axis, 0)() - self.axis.rank * local
        rows = choices.count_rows()
        rows = None if rows is None else rows * self.axis.size
        permutation, counts_e = sort_choices(chosen_GC, (chosen_GC >= 0) & (chosen_GC < local), local, rows)
        by_expert = counts_e.tolist() if rows is None else [rows] * local
        return Sent(token, weights_GC, permutation, counts_e, exchange, rows=tuple(by_expert))

    def run(self, sent: Sent, experts: Experts) -> Tensor:
        """Pass the tokens that chose local experts through those, and sum what each token got over the ranks."""
        assert sent.exchange is not None
        assert sent.rows is not None
        x_RD = permute(sent.exchange.finish(sent.x), sent.permutation, sum(sent.rows))
        y_GD = unpermute(experts(x_RD, sent.counts, sent.rows), sent.permutation, sent.weights_NC)
        return reduce_scatter(y_GD, self.axis, 0)


@dataclass(frozen=True, slots=True)
class TensorDispatcher:
    """Passes the tokens of all tensor ranks through experts that those share, of which each has a part of the features.

    Under sequence parallelism tokens are gathered and sums scattered; without it every rank has all tokens already.
    """

    axis: Axis
    sequence: bool
    dispatcher: TokenDispatcher
    """What takes tokens to the experts of the expert ranks."""
    traceable: ClassVar[bool] = False

    def send(self, x_ND: Tensor, choices: Choices) -> Sent:
        """Bring the tokens of all tensor ranks together, and begin to bring them to their experts."""
        weights_NC, chosen_NC, kept_NC, experts, capacity = choices
        if not self.sequence:
            x_ND, weights_NC = (copy_to_tensor_parallel(t, self.axis) for t in (x_ND, weights_NC))
            return self.dispatcher.send(x_ND, Choices(weights_NC, chosen_NC, kept_NC, experts, capacity))
        x_GD, weights_GC = (all_gather(t, self.axis, 0) for t in (x_ND, weights_NC))
        chosen_GC = all_gather_async(chosen_NC, self.axis, 0)()
        kept_GC = None if kept_NC is None else all_gather_async(kept_NC.byte(), self.axis, 0)().bool()
        return self.dispatcher.send(x_GD, Choices(weights_GC, chosen_GC, kept_GC, experts, capacity))

    def run(self, sent: Sent, experts: Experts) -> Tensor:
        """Sum up what the parts of experts on all tensor ranks return."""
        y_GD = self.dispatcher.run(sent, experts)
        return reduce_scatter(y_GD, self.axis, 0) if self.sequence else reduce_from_tensor_parallel(y_GD, self.axis)


dispatch = LocalDispatcher()
"""The dispatcher of a layer whose experts are on one rank."""

DISPATCHERS: Mapping[TokenDispatcherName, Callable[[Axis], TokenDispatcher]] = {
    "all_to_all": AllToAllDispatcher,
    "all_gather": AllGatherDispatcher,
}
"""Dispatchers by their name in the configuration, for the axis that cuts the experts."""
