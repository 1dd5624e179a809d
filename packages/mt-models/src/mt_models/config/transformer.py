"""What the configurations of all models have."""

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt

from mt_core.config.sections import Section
from mt_models.config import shapes
from mt_models.config.attention import GQA
from mt_models.config.norm import LayerNorm, RMSNorm

if TYPE_CHECKING:
    from torch import Generator, Tensor


class TransformerSection(Section):
    """The fields that every model has; each model narrows `kind` and `mlp`, and may say more of the others."""

    kind: Any
    """Which model it is."""
    layers: PositiveInt
    """Transformer blocks."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    vocab_size: PositiveInt
    """Token ids, before padding."""
    max_seq_len: PositiveInt
    """Longest sequence in tokens."""
    attention: GQA
    """Attention of every block."""
    mlp: Any
    """Feed-forward layer of every block."""
    norm: Annotated[RMSNorm | LayerNorm, Field(discriminator="kind")]
    """Norms of the blocks."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights; projections into the residual stream use init_std / sqrt(2 · layers)."""
    vocab_divisor: PositiveInt = 128
    """Embedding and output rows are padded to a multiple of this inside the module; padding never gets probability."""

    def vocab_rows(self, tensor: int = 1) -> int:
        """Rows of the embedding in memory, over all of `tensor` ranks."""
        return shapes.padded_rows(self.vocab_size, self.vocab_divisor, tensor)

    @abstractmethod
    def canonical_shapes(self) -> shapes.Shapes:
        """Name and shape of every tensor in a checkpoint of this model: un-fused and un-padded."""

    def random_inputs(self, tokens_BT: "Tensor", generator: "Generator") -> "dict[str, Tensor]":
        """A batch around random tokens, for `mt verify`: all the model takes but labels and loss mask."""
        del generator
        return {"tokens": tokens_BT}

    @property
    def parameter_count(self) -> int:
        """Parameters, without padding; a tied weight counts once."""
        return shapes.count(self.canonical_shapes())


def random_padding(tokens_BT: "Tensor", generator: "Generator") -> "Tensor":
    """A padding mask int64 [B, T]: 1 for a random number of tokens, at least half of them, then 0."""
    import torch

    samples, length = tokens_BT.shape
    ends_B1 = torch.randint(length // 2, length + 1, (samples, 1), generator=generator)
    return (torch.arange(length) < ends_B1).long()
