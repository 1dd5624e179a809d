"""Configuration of `T5`."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from mt_models.config.attention import KV, QKV, Unwindowed
from mt_models.config.mlp import Dense, Gated
from mt_models.config.norm import LayerNorm, RMSNorm
from mt_models.config.position import Learned, Relative
from mt_models.config.tensors import INPUTS, CanonicalTensor, Tensors, matrix_parameters, repeat_block
from mt_models.config.transformer import TransformerSection, random_padding

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from mt_models.models.t5 import T5


class T5Config(TransformerSection):
    """An encoder and a decoder that attends to its features (arXiv:1910.10683), of pre-normalised residual blocks."""

    layer_keys: ClassVar[str] = "model.layers + model.decoder_layers"
    kind: Literal["t5"] = "t5"
    layers: PositiveInt
    """Blocks of the encoder."""
    decoder_layers: PositiveInt = Field(default_factory=lambda values: values.get("layers", 1))
    """Blocks of the decoder; as many as the encoder's unless given."""
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

    def canonical_tensors(self) -> Tensors:
        """Every tensor in a checkpoint of this model, un-fused and un-padded."""
        tensors = self.vocab_tensors("embed")
        if self.position.kind == "learned":
            tensors["position.weight"] = CanonicalTensor((self.max_seq_len, self.hidden_size))
        tensors |= self._stack_tensors("encoder") | self._stack_tensors("decoder")
        return tensors | self.vocab_tensors("head", weight=not self.tied, bias=self.head_bias)

    @property
    def total_layers(self) -> int:
        """Blocks of the encoder, then those of the decoder."""
        return self.layers + self.decoder_layers

    def split_layers(self, numbers: range) -> tuple[range, range]:
        """The encoder's and the decoder's blocks among those of the whole model, numbered in their stacks."""
        decoder = range(max(numbers.start - self.layers, 0), max(numbers.stop - self.layers, 0))
        return range(min(numbers.start, self.layers), min(numbers.stop, self.layers)), decoder

    def stack_layers(self, stack: str) -> int:
        """Blocks of the "encoder" or the "decoder"."""
        return self.layers if stack == "encoder" else self.decoder_layers

    def block_norms(self, stack: str) -> tuple[str, ...]:
        """Names of the norms of a block, those of heads left out."""
        return ("attn_norm", *(("cross_norm",) if stack == "decoder" else ()), "mlp_norm")

    def _stack_tensors(self, stack: str) -> Tensors:
        tensors: Tensors = {}
        if self.position.kind == "relative":
            shape = (self.position.buckets, self.attention.heads)
            tensors[f"{stack}.relative.weight"] = CanonicalTensor(shape, INPUTS)
        tensors |= repeat_block(self._block_tensors(stack), self.stack_layers(stack), f"{stack}.layers")
        return tensors | (self.norm.tensors(f"{stack}.norm", self.hidden_size) if self.final_norm else {})

    def _block_tensors(self, stack: str) -> Tensors:
        tensors: Tensors = {}
        for name in self.block_norms(stack):
            tensors |= self.norm.tensors(name, self.hidden_size)
        tensors |= self.attention.tensors("attn", self.hidden_size, self.norm, QKV)
        if stack == "decoder":
            tensors |= self.attention.tensors("cross", self.hidden_size, self.norm, KV)
        return tensors | self.mlp.tensors("mlp", self.hidden_size)

    def flops_per_token(self, sequence: int, target: int | None = None) -> float:
        """Training FLOPs per token of the encoder's sequence, where the decoder's is `target` long, or as long.

        6 · matrix parameters + 12 · heads · head_size · keys: in the encoder all of the sequence, in the decoder half
        of its own and all of the encoder's.
        """
        share = 1.0 if target is None else target / max(sequence, 1)  # the decoder's tokens for each of the encoder's
        block = self._block_tensors("decoder")
        across = {name: tensor for name, tensor in block.items() if name.startswith(("cross.k.", "cross.v."))}
        read = self.decoder_layers * matrix_parameters(across)  # these work on the encoder's tokens
        written = self.decoder_layers * matrix_parameters(block) - read
        read += self.layers * matrix_parameters(self._block_tensors("encoder"))
        written += self.vocab_size * self.hidden_size
        keys = self.layers * sequence + share * self.decoder_layers * (sequence + share * sequence / 2)
        return 6.0 * (read + share * written) + self.attention.score_flops(keys)
