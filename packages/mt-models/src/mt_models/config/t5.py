"""Configuration of `T5`."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt

from mt_models.config import shapes
from mt_models.config.attention import Unwindowed
from mt_models.config.mlp import Dense, Gated
from mt_models.config.norm import LayerNorm, RMSNorm
from mt_models.config.position import Learned, Relative
from mt_models.config.transformer import TransformerSection, random_padding

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from mt_models.models.t5 import T5


class T5Config(TransformerSection):
    """An encoder and a decoder that attends to its features (arXiv:1910.10683), of pre-normalised residual blocks."""

    kind: Literal["t5"] = "t5"
    layers: PositiveInt
    """Blocks of the encoder."""
    decoder_layers: PositiveInt
    """Blocks of the decoder."""
    max_seq_len: PositiveInt
    """Longest sequence in tokens, of the encoder and of the decoder."""
    attention: Unwindowed
    """Attention of every block, to its own sequence and to the encoder's; T5's own has scale = 1."""
    mlp: Annotated[Dense | Gated, Field(discriminator="kind")]
    """Feed-forward layer of every block."""
    norm: Annotated[RMSNorm | LayerNorm, Field(discriminator="kind")]
    """Before each part of every block, and at the end of encoder and decoder."""
    final_norm: bool = True
    """Encoder and decoder end with a norm; Megatron-Core's newer releases have none without Transformer Engine."""
    position: Annotated[Relative | Learned, Field(discriminator="kind")]
    """How the model knows where a token stands: numbers added to scores, or vectors added to embeddings (Megatron)."""
    tied: bool = False
    """The output layer uses the embedding's weight."""
    scaled_head: bool = False
    """The output layer's input is divided by sqrt(hidden_size), as in the original T5, whose weight is tied."""
    head_bias: bool = False
    """The output layer has a bias, as Megatron's."""

    def build(self, tensor: int = 1) -> "T5":
        """The module, parameters uninitialised, on the current default device and dtype; whole, for `tensor` ranks."""
        from mt_models.models.t5 import T5

        return T5(self, tensor)

    def random_inputs(self, tokens_BT: "Tensor", generator: "Generator") -> "dict[str, Tensor]":
        """The decoder's tokens, backwards as the encoder's, with padding at the end of those."""
        text_BT = random_padding(tokens_BT, generator)
        return {"text_dec": tokens_BT, "text_enc": tokens_BT.flip(1), "enc_mask": text_BT}

    def canonical_shapes(self) -> shapes.Shapes:
        """Name and shape of every tensor in a checkpoint of this model: un-fused and un-padded."""
        found: shapes.Shapes = {"embed.weight": (self.vocab_size, self.hidden_size)}
        if self.position.kind == "learned":
            found["position.weight"] = (self.max_seq_len, self.hidden_size)
        found |= self._stack_shapes("encoder") | self._stack_shapes("decoder")
        if not self.tied:
            found["head.weight"] = (self.vocab_size, self.hidden_size)
        return found | ({"head.bias": (self.vocab_size,)} if self.head_bias else {})

    def stack_layers(self, stack: str) -> int:
        """Blocks of the "encoder" or the "decoder"."""
        return self.layers if stack == "encoder" else self.decoder_layers

    def block_norms(self, stack: str) -> tuple[str, ...]:
        """Names of the norms of a block, those of heads left out."""
        return ("attn_norm", *(("cross_norm",) if stack == "decoder" else ()), "mlp_norm")

    def _stack_shapes(self, stack: str) -> shapes.Shapes:
        found: shapes.Shapes = {}
        if self.position.kind == "relative":
            found[f"{stack}.relative.weight"] = (self.position.buckets, self.attention.heads)
        found |= shapes.repeated(self._block_shapes(stack), self.stack_layers(stack), f"{stack}.layers")
        return found | shapes.norms(self.norm, {f"{stack}.norm": self.hidden_size} if self.final_norm else {})

    def _block_shapes(self, stack: str) -> shapes.Shapes:
        found = shapes.norms(self.norm, dict.fromkeys(self.block_norms(stack), self.hidden_size))
        found |= shapes.attention(self.attention, self.norm, self.hidden_size)
        if stack == "decoder":
            found |= shapes.attention(self.attention, self.norm, self.hidden_size, name="cross")
        return found | shapes.mlp(self.mlp, self.hidden_size)

    def flops_per_token(self, sequence: int, target: int | None = None) -> float:
        """Training FLOPs per token of the encoder's sequence, where the decoder's is `target` long, or as long.

        6 · matrix parameters + 12 · heads · head_size · keys: in the encoder all of the sequence, in the decoder half
        of its own and all of the encoder's.
        """
        share = 1.0 if target is None else target / max(sequence, 1)  # the decoder's tokens for each of the encoder's
        block = self._block_shapes("decoder")
        across = {name: shape for name, shape in block.items() if name.startswith(("cross.k.", "cross.v."))}
        read = self.decoder_layers * shapes.matrix_parameters(across.values())  # these work on the encoder's tokens
        written = self.decoder_layers * shapes.matrix_parameters(block.values()) - read
        read += self.layers * shapes.matrix_parameters(self._block_shapes("encoder").values())
        written += self.vocab_size * self.hidden_size
        keys = self.layers * sequence + share * self.decoder_layers * (sequence + share * sequence / 2)
        return 6.0 * (read + share * written) + 12.0 * self.attention.heads * self.attention.head_size * keys
