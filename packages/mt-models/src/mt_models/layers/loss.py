"""The loss of a language model's output layer."""

from collections.abc import Callable

from torch import Tensor, nn

from mt_core.parallel.tensor.cross_entropy import linear_cross_entropy


class CrossEntropy(nn.Module):
    """Cross-entropy of labels under the logits x · weightᵀ + bias; rows from `vocab_size` on are padding.

    With a `softcap`, logits l become softcap · tanh(l / softcap).
    """

    def __init__(self, vocab_size: int, softcap: float | None = None) -> None:
        super().__init__()
        self.vocab_size, self.softcap = vocab_size, softcap
        self.op: Callable[..., Tensor] = linear_cross_entropy

    def forward(self, x_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, bias_V: Tensor | None = None) -> Tensor:
        """In nats, [B, T], fp32 or wider, not reduced."""
        return self.op(x_BTD, weight_VD, labels_BT, self.vocab_size, softcap=self.softcap, bias_V=bias_V)
