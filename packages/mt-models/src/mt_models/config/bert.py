"""Configuration of `Bert`."""

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mt_core.config.section import Section
from mt_models.config import shapes
from mt_models.config.attention import GQA
from mt_models.config.mlp import Dense, Gated
from mt_models.config.norm import LayerNorm, RMSNorm

if TYPE_CHECKING:
    from mt_models.bert import Bert


class BertConfig(Section):
    """An encoder: every token sees all others. Its heads predict hidden words and whether two parts are in order."""

    kind: Literal["bert"] = "bert"
    layers: PositiveInt
    """Transformer blocks."""
    model_size: PositiveInt
    """Width of the residual stream."""
    vocab_size: PositiveInt
    """Token ids, before padding."""
    max_positions: PositiveInt
    """Longest sequence in tokens; each position has a learned vector."""
    token_types: NonNegativeInt = 2
    """Kinds of tokens that have a learned vector each, such as those of a first and a second part; 0 for none."""
    attention: GQA
    """Attention of every block."""
    mlp: Annotated[Dense | Gated, Field(discriminator="kind")]
    """Feed-forward layer of every block."""
    norm: Annotated[RMSNorm | LayerNorm, Field(discriminator="kind")]
    """Norms of the blocks, of the whole and of the language-model head."""
    norm_place: Literal["before", "after"] = "before"
    """"before" attention and feed-forward layer, and one at the end (Megatron); "after" their output is added, and one
    after the embeddings (the original BERT)."""
    lm_head: bool = True
    """A head that predicts tokens: dense, activation, norm, and the embedding's weight with a bias of its own."""
    head_activation: Literal["gelu", "gelu_tanh", "relu", "squared_relu", "silu"] | None = None
    """Of the language-model head; unset, that of `mlp`. Megatron has the exact "gelu" there in any case."""
    pooler: bool = True
    """A dense layer and tanh over the first token's features."""
    binary_head: bool = True
    """Two logits from the pooler: is the second part really the second?"""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights; projections into the residual stream use init_std / sqrt(2 · layers)."""
    vocab_divisor: PositiveInt = 128
    """Embedding and output rows are padded to a multiple of this inside the module; padding never gets probability."""

    @model_validator(mode="after")
    def _heads_have_what_they_need(self) -> Self:
        if self.binary_head and not self.pooler:
            raise ValueError("binary_head needs pooler")
        return self

    @model_validator(mode="after")
    def _no_window(self) -> Self:
        if self.attention.window is not None:
            raise ValueError("attention.window is for models in which tokens see only those before them")
        return self

    def vocab_rows(self, tensor: int = 1) -> int:
        """Rows of the embedding in memory, over all of `tensor` ranks."""
        return shapes.padded_rows(self.vocab_size, self.vocab_divisor, tensor)

    def build(self, tensor: int = 1) -> "Bert":
        """The module, parameters uninitialised, on the current default device and dtype; whole, for `tensor` ranks."""
        from mt_models.bert import Bert

        return Bert(self, tensor)

    def canonical_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor in a checkpoint of this model: un-fused and un-padded."""
        D = self.model_size
        found: shapes.Shapes = {"embed.weight": (self.vocab_size, D), "position.weight": (self.max_positions, D)}
        if self.token_types:
            found["token_type.weight"] = (self.token_types, D)
        found |= shapes.norms(self.norm, {"embed_norm": D} if self.norm_place == "after" else {})
        found |= shapes.repeated(self._block_shapes(), self.layers)
        found |= shapes.norms(self.norm, {"norm": D} if self.norm_place == "before" else {})
        if self.lm_head:
            found |= shapes.linear("lm_head.dense", D, D, bias=True) | shapes.norms(self.norm, {"lm_head.norm": D})
            found["head.bias"] = (self.vocab_size,)
        if self.pooler:
            found |= shapes.linear("pooler", D, D, bias=True)
        return found | (shapes.linear("binary_head", 2, D, bias=True) if self.binary_head else {})

    @property
    def parameter_count(self) -> int:
        """Parameters, without padding; a tied weight counts once."""
        return shapes.count(self.canonical_shapes())

    def _block_shapes(self) -> shapes.Shapes:
        found = shapes.norms(self.norm, {"attn_norm": self.model_size, "mlp_norm": self.model_size})
        found |= shapes.attention(self.attention, self.norm, self.model_size)
        return found | shapes.mlp(self.mlp, self.model_size)

    def flops_per_token(self, sequence: int) -> float:
        """Training FLOPs per token of the text: 6 · matrix parameters + 12 · layers · heads · head_size · sequence.

        The output layer counts as a matrix; what happens to one token of a sequence, the pooler, is left out.
        """
        matrices = self.layers * shapes.matrix_parameters(self._block_shapes().values())
        if self.lm_head:
            matrices += (self.vocab_size + self.model_size) * self.model_size
        return 6.0 * matrices + 12.0 * self.layers * self.attention.heads * self.attention.head_size * sequence
