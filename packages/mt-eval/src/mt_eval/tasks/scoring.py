"""Log-likelihood of one long token sequence under a model with a limited context: overlapping windows.

The one thing to know: every token but the first is scored exactly once, whatever the window and the stride.
A smaller stride gives each token more context and costs proportionally more time.

Source: docs/specs/evaluation.md §3.2.

Shape suffixes: B windows in a batch, T tokens of a window.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mt_core.errors import MtError
from mt_core.progress import progress

if TYPE_CHECKING:
    from torch import Tensor

    from mt_models.models.gpt import GPT

LOSS_CAP = 20.0
"""Mean losses are capped here before the exponential, so that a broken model still gives a finite perplexity."""


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


def check_stride(stride: int, seq_length: int) -> None:
    """Refuse a stride that would skip targets."""
    if not 1 <= stride <= seq_length:
        raise MtError("--overlapping-eval", f"{stride}", f"1 to {seq_length}, the length of a window")


def sum_loss(model: "GPT", tokens: Sequence[int], *, seq_length: int, stride: int, batch_size: int) -> float:
    """Sum over tokens 1 … T−1 of −log p(token | the tokens before it in its window), in nats."""
    import torch

    check_stride(stride, seq_length)
    if len(tokens) < 2:
        raise MtError("--data", f"{len(tokens)} tokens", "a text of at least two tokens")
    device = next(model.parameters()).device
    sequence = torch.as_tensor(tokens, dtype=torch.int64)
    spans = list(make_windows(len(tokens), seq_length, stride))
    total = torch.zeros((), dtype=torch.float64, device=device)
    with torch.inference_mode(), progress("scoring", len(spans), "windows") as advance:
        for first in range(0, len(spans), batch_size):
            batch = spans[first : first + batch_size]
            tokens_BT, labels_BT, scored_BT = (tensor.to(device) for tensor in _tensors(sequence, batch))
            losses_BT = model.token_losses(tokens_BT, labels_BT)
            total += losses_BT[scored_BT].sum(dtype=torch.float64)
            advance(len(batch))
    return total.item()


def _tensors(sequence: "Tensor", batch: Sequence[Window]) -> tuple["Tensor", "Tensor", "Tensor"]:
    """Tokens, labels and which of them count; the short last window is filled up on the right and masked."""
    length = max(span.stop - span.start for span in batch)
    tokens_BT = sequence.new_zeros(len(batch), length)
    labels_BT, scored_BT = tokens_BT.clone(), tokens_BT.bool()
    for row, span in enumerate(batch):
        size = span.stop - span.start
        tokens_BT[row, :size] = sequence[span.start : span.stop]
        labels_BT[row, :size] = sequence[span.start + 1 : span.stop + 1]
        scored_BT[row, span.scored_from - span.start - 1 : size] = True
    return tokens_BT, labels_BT, scored_BT
