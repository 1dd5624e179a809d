"""What the head of a task on whole texts computes, and the loss of each sample; its one layer is the model's own.

Shape suffixes: B samples, C classes, or choices of a question, N texts (B, or B · choices), T tokens, D model size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mt_core.contracts import Losses, MetricSum
from mt_core.parallel.dropout import DropoutKeys, drop_features, fold, number_positions
from mt_core.parallel.tensor.first_token import take_first_token
from mt_models.layers.dropout import MLP_OUTPUT

ACCURACY = "accuracy"
"""Name of the metric: the share of samples whose label has the highest logit."""
UNLABELLED = -1
"""The label of samples that count in no loss and no accuracy, such as those that fill up a last batch."""


class FirstToken(nn.Module):
    """The features of every sequence's first token, which tensor ranks with parts of sequences exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.op: Callable[[Tensor], Tensor] = take_first_token

    def forward(self, x_NTD: Tensor) -> Tensor:
        """[N, T, D] to [N, D]."""
        return self.op(x_NTD)


def drop_pooled(pooled_ND: Tensor, rate: float, dropout: DropoutKeys | None) -> Tensor:
    """Drop features of the texts' vectors, with keys of a layer behind the last; without keys none."""
    if dropout is None or not rate:
        return pooled_ND
    keys = dropout._replace(positions_T=number_positions(0, 1, pooled_ND.device))
    return drop_features(pooled_ND[:, None], keys, rate, MLP_OUTPUT)[:, 0]


def compute_class_losses(logits_BC: Tensor, labels_B: Tensor) -> Losses:
    """Cross-entropy of each sample's label in nats, [B], fp32 or wider, and how often the label is the first choice.

    Samples without a label, −1, have a loss of 0 and do not count in the accuracy.
    """
    logits_BC = logits_BC.to(torch.promote_types(logits_BC.dtype, torch.float32))
    losses_B = F.cross_entropy(logits_BC, labels_B, ignore_index=UNLABELLED, reduction="none")
    counted_B = (labels_B != UNLABELLED).to(logits_BC.dtype)
    hits_B = (logits_BC.argmax(-1) == labels_B).to(logits_BC.dtype)
    return Losses(samples=losses_B, metrics={ACCURACY: MetricSum(hits_B.sum(), counted_B.sum())})


def compute_squared_errors(outputs_B1: Tensor, labels_B: Tensor) -> Losses:
    """The squared error of each sample's number, [B], fp32 or wider; 0 without a label, which is any below 0."""
    outputs_B = outputs_B1[:, 0].to(torch.promote_types(outputs_B1.dtype, torch.float32))
    errors_B = outputs_B - labels_B.to(outputs_B.dtype)
    return Losses(samples=errors_B.square().where(labels_B >= 0, 0))


def count_choices(tokens: Tensor) -> int:
    """The texts of a sample: its choices if tokens are [B, C, T], else 1."""
    return tokens.shape[1] if tokens.dim() == 3 else 1


def flatten_choices(texts: Tensor) -> Tensor:
    """[B, C, T] to [B · C, T]; what is [N, T] stays as it is."""
    return texts.flatten(0, 1) if texts.dim() == 3 else texts


def split_choices(keys_B: Tensor | None, choices: int) -> Tensor | None:
    """Dropout keys of samples as those of their choices' texts, each with masks of its own."""
    if keys_B is None or choices == 1:
        return keys_B
    return fold(keys_B[:, None], torch.arange(choices, dtype=torch.int32, device=keys_B.device)).flatten()
