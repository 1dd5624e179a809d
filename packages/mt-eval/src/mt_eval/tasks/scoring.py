"""Log-likelihood of one long token sequence under a model with a limited context: overlapping windows.

The one thing to know: every token but the first is scored exactly once, whatever the window and the stride.
A smaller stride gives each token more context and costs proportionally more time.

Source: docs/specs/evaluation.md §3.2.

Shape suffixes: B windows in a batch, T tokens of a window.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from mt_core.errors import MtError
from mt_core.progress import progress
from mt_eval.finite import NonFiniteOutput

if TYPE_CHECKING:
    from torch import Tensor

    from mt_models.models.gpt import GPT

LOSS_CAP = 20.0
"""Mean losses are capped here before the exponential, so that an untrained model still gives a finite perplexity."""


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """Documents as one sequence of tokens; all but the first token and the `unscored` ones are predicted."""

    tokens: Sequence[int]
    unscored: frozenset[int] = frozenset()
    """Places in `tokens` of what the tokenizer put before a text."""
    documents: Sequence[tuple[int, str]] = ((0, "text"),)
    """Place of the first token of every document, and where it stands: `file:line`."""

    @property
    def num_scored(self) -> int:
        """Tokens that are predicted."""
        return len(self.tokens) - len(self.unscored | {0})

    def find_document(self, place: int) -> int:
        """The number of the document at a place in `tokens`; what stands before the first one is part of it."""
        return max(bisect_right(self.documents, place, key=lambda document: document[0]) - 1, 0)

    def count_scored(self) -> list[int]:
        """Tokens of each document that are predicted, an end of document behind it among them."""
        firsts = [0, *(first for first, _ in self.documents[1:]), len(self.tokens)]
        counts = [last - first for first, last in pairwise(firsts)]
        for place in self.unscored | ({0} if self.tokens else set()):
            counts[self.find_document(place)] -= 1
        return counts

    def locate(self, place: int) -> str:
        """The document and the token in it, from 1, that stand at a place in `tokens`."""
        first, name = self.documents[self.find_document(place)]
        return f"{name}, token {place - first + 1}"


@dataclass(frozen=True, slots=True)
class Window:
    """Feed tokens [start, stop) and score the targets [scored_from, stop + 1)."""

    start: int
    stop: int
    scored_from: int


def make_windows(total: int, seq_length: int, stride: int) -> Iterator[Window]:
    """Windows over `total` tokens: the first scores all its targets, each later one its last `stride`.

    Windows that would score nothing are left out. Needs 1 ≤ stride ≤ seq_length.
    """
    assert 1 <= stride <= seq_length, (stride, seq_length)
    last = total - 1
    for start in range(0, max(last - seq_length + stride, min(last, 1)), stride):
        yield Window(start, min(start + seq_length, last), start + seq_length - stride + 1 if start else 1)


def compute_perplexity(mean_loss: float) -> float:
    """exp of a mean loss in nats, finite for any loss."""
    return math.exp(min(LOSS_CAP, mean_loss))


def compute_perplexity_stderr(mean_loss: float, error: float | None) -> float | None:
    """The standard error of exp of a mean loss, to first order; None if that has none or is capped."""
    return None if error is None or mean_loss > LOSS_CAP else math.exp(mean_loss) * error


def check_stride(stride: int, seq_length: int) -> None:
    """Refuse a stride that would skip targets."""
    if not 1 <= stride <= seq_length:
        raise MtError("--overlapping-eval", f"{stride}", f"1 to {seq_length}, the length of a window")


def sum_losses(model: "GPT", text: TokenizedText, *, seq_length: int, stride: int, batch_size: int) -> list[float]:
    """For each document, the sum over its scored tokens of −log p(token | the tokens before it in its window), in nats.

    A loss that is not finite is an `MtError` naming the first token that has one.
    """
    import torch

    check_stride(stride, seq_length)
    if text.num_scored < 1:
        raise MtError("--data", f"{len(text.tokens)} tokens", "a text of at least two tokens")
    device = next(model.parameters()).device
    sequence = torch.as_tensor(text.tokens, dtype=torch.int64)
    counted = torch.ones_like(sequence, dtype=torch.bool)
    counted[list(text.unscored)] = False
    firsts = torch.tensor([first for first, _ in text.documents])
    spans = list(make_windows(len(sequence), seq_length, stride))
    sums = torch.zeros(len(firsts), dtype=torch.float64)
    with torch.inference_mode(), progress("scoring", len(spans), "windows") as advance:
        for first in range(0, len(spans), batch_size):
            batch = spans[first : first + batch_size]
            tokens_BT, labels_BT, scored_BT = (t.to(device) for t in _tensors(sequence, counted, batch))
            losses_BT = model.token_losses(tokens_BT, labels_BT).double().masked_fill(~scored_BT, 0).cpu()
            if not losses_BT.sum().isfinite():
                row = int((~losses_BT.isfinite()).any(-1).nonzero()[0])
                rows = slice(row, row + 1)
                place = _find_first(model, tokens_BT[rows], labels_BT[rows], scored_BT[rows])
                raise NonFiniteOutput(text.locate(batch[row].start + place + 1), "a loss that is not finite")
            starts_B = torch.tensor([span.start for span in batch])
            places_BT = starts_B[:, None] + torch.arange(1, 1 + losses_BT.shape[1])
            documents_BT = (torch.searchsorted(firsts, places_BT, right=True) - 1).clamp(min=0)
            sums.index_add_(0, documents_BT.flatten(), losses_BT.flatten())
            advance(len(batch))
    return sums.tolist()


def _find_first(model: "GPT", tokens_BT: "Tensor", labels_BT: "Tensor", scored_BT: "Tensor") -> int:
    """The first place of a sequence with a scored loss that is not finite.

    Shorter and shorter beginnings are computed, as NaN spreads to places before it: attention multiplies it by zero.
    """

    def is_bad(length: int) -> bool:
        losses_BT = model.token_losses(tokens_BT[:, :length], labels_BT[:, :length])
        return not losses_BT[scored_BT[:, :length]].isfinite().all()

    return bisect_left(range(1, tokens_BT.shape[1] + 1), True, key=is_bad)


def _tensors(sequence: "Tensor", counted: "Tensor", batch: Sequence[Window]) -> tuple["Tensor", "Tensor", "Tensor"]:
    """Tokens, labels and which of them count; the short last window is filled up on the right and masked."""
    length = max(span.stop - span.start for span in batch)
    tokens_BT = sequence.new_zeros(len(batch), length)
    labels_BT, scored_BT = tokens_BT.clone(), tokens_BT.bool()
    for row, span in enumerate(batch):
        size, first = span.stop - span.start, span.scored_from - span.start - 1
        tokens_BT[row, :size] = sequence[span.start : span.stop]
        labels_BT[row, :size] = sequence[span.start + 1 : span.stop + 1]
        scored_BT[row, first:size] = counted[span.scored_from : span.stop + 1]
    return tokens_BT, labels_BT, scored_BT
