"""What the configurations of all models have."""

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, PositiveFloat, PositiveInt, WithJsonSchema

from mt_core.config.sections import Section
from mt_core.parallel.cuts import CutSize, TensorCut
from mt_models.config.dropout import Dropout
from mt_models.config.norm import LayerNorm, RMSNorm
from mt_models.config.tensors import CanonicalTensor, Tensors, count_parameters

if TYPE_CHECKING:
    from torch import Generator, Tensor


class TransformerSection(Section):
    """The fields that every model has; each model narrows those of `Any`, and may say more of the others."""

    layer_keys: ClassVar[str] = "model.layers"
    """The keys that add up to `total_layers`."""
    kind: Any
    """Which model it is."""
    layers: PositiveInt
    """Transformer blocks."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    vocab_size: Annotated[
        PositiveInt, WithJsonSchema({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"const": "tokenizer"}]})
    ]
    """Token ids, before padding; `"tokenizer"` in a file takes as many as `data.tokenizer` has."""
    max_seq_len: PositiveInt
    """Longest sequence in tokens."""
    attention: Any
    """Attention of every block."""
    mlp: Any
    """Feed-forward layer of every block."""
    norm: Annotated[RMSNorm | LayerNorm, Field(discriminator="kind")]
    """Norms of the blocks."""
    dropout: Dropout = Dropout()
    """What training drops."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights; projections into the residual stream use init_std / sqrt(2 · layers)."""
    vocab_divisor: PositiveInt = 128
    """Embedding and output rows are padded to a multiple of this inside the module; padding never gets probability."""

    def vocab_rows(self, tensor: int = 1) -> int:
        """Rows of the embedding in memory, over all of `tensor` ranks."""
        return self.vocab_cut.local_length(self.vocab_size, tensor) * tensor

    @property
    def vocab_cut(self) -> TensorCut:
        """How tensor ranks divide what has a row for each token id."""
        return TensorCut(0, divisor=self.vocab_divisor)

    def vocab_tensors(self, name: str, *, weight: bool = True, bias: bool = False) -> Tensors:
        """The canonical tensors of an embedding, or of the output layer."""
        tensors: Tensors = {}
        if weight:
            tensors[f"{name}.weight"] = CanonicalTensor((self.vocab_size, self.hidden_size), self.vocab_cut)
        return tensors | ({f"{name}.bias": CanonicalTensor((self.vocab_size,), self.vocab_cut)} if bias else {})

    @property
    def total_layers(self) -> int:
        """Blocks of the whole model, which stages of a pipeline divide."""
        return self.layers

    @abstractmethod
    def canonical_tensors(self) -> Tensors:
        """Every tensor in a checkpoint of this model, un-fused and un-padded."""

    def canonical_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor in a checkpoint of this model."""
        return {name: tensor.shape for name, tensor in self.canonical_tensors().items()}

    def canonical_cuts(self) -> dict[str, TensorCut]:
        """How ranks divide each canonical tensor, of those that they divide."""
        return {name: tensor.cut for name, tensor in self.canonical_tensors().items() if tensor.cut is not None}

    def cut_sizes(self) -> list[CutSize]:
        """The sizes that ranks divide, of all parts of the model."""
        return [*self.attention.cut_sizes("model.attention"), *self.mlp.cut_sizes("model.mlp")]

    def random_inputs(self, tokens_BT: "Tensor", generator: "Generator") -> "dict[str, Tensor]":
        """A batch around random tokens, for `mt verify`: all the model takes but labels and loss mask."""
        del generator
        return {"tokens": tokens_BT}

    @property
    def draws(self) -> bool:
        """Whether training draws random numbers: for dropout, or a router's jitter."""
        return self.dropout.is_active or (self.mlp.kind == "moe" and self.mlp.jitter > 0)

    @property
    def parameter_count(self) -> int:
        """Parameters, without padding; a tied weight counts once."""
        return count_parameters(self.canonical_tensors().values())


def random_padding(tokens_BT: "Tensor", generator: "Generator") -> "Tensor":
    """A padding mask int64 [B, T]: 1 for a random number of tokens, at least half of them, then 0."""
    import torch

    samples, length = tokens_BT.shape
    ends_B1 = torch.randint(length // 2, length + 1, (samples, 1), generator=generator)
    return (torch.arange(length) < ends_B1).long()
