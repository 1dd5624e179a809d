"""T5: an encoder, and a decoder that also attends to the encoder's features (arXiv:1910.10683).

Positions are numbers added to scores, shared by the layers of a stack, or as in Megatron vectors added to embeddings.

Shape suffixes: B batch, S tokens of the encoder, T tokens of the decoder or of either, D model size, H heads,
V vocabulary (its true size; padding rows never reach a logit).
"""

import math
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import torch.nn.functional as F
from torch import Tensor, nn

from mt_core.contracts import BatchKey, Losses
from mt_core.parallel.dropout import DropoutKeys
from mt_models.config import T5Config
from mt_models.layers.attention import Attention, CrossAttention
from mt_models.layers.attention_cores import Core
from mt_models.layers.basic import CrossEntropy, Embedding, Head, make_norm
from mt_models.layers.dropout import (
    ATTENTION_OUTPUT,
    CROSS_OUTPUT,
    DECODER_EMBEDDING,
    EMBEDDING,
    MLP_OUTPUT,
    HiddenDropout,
)
from mt_models.layers.mlp import make_mlp
from mt_models.layers.relative_bias import RelativeBias
from mt_models.models.base import Run, Transformer, split_layers

SPAN_LOSS = "span_loss"
"""Name of the metric: the mean loss of the words of hidden spans."""


class Block(nn.Module):
    """Residual block: attention, in the decoder attention to the encoder, a feed-forward layer, each after a norm."""

    def __init__(self, config: T5Config, core: Core, tensor: int = 1, *, encoder: bool) -> None:
        super().__init__()
        D, biased = config.hidden_size, config.position.kind == "relative"
        self.attn_norm = make_norm(config.norm, D)
        self.attn = Attention(config, core, tensor, bidirectional=encoder, biased=biased)
        self.cross_norm = None if encoder else make_norm(config.norm, D)
        self.cross = None if encoder else CrossAttention(config, core, tensor)
        self.mlp_norm = make_norm(config.norm, D)
        self.mlp = make_mlp(config.mlp, D)
        rate = config.dropout.hidden
        self.attn_dropout, self.mlp_dropout = HiddenDropout(rate, ATTENTION_OUTPUT), HiddenDropout(rate, MLP_OUTPUT)
        self.cross_dropout = None if encoder else HiddenDropout(rate, CROSS_OUTPUT)

    def forward(
        self,
        x_BTD: Tensor,
        bias_HTT: Tensor | None,
        *,
        segment_ids_BT: Tensor | None = None,
        encoded_BSD: Tensor | None = None,
        padding_mask_BS: Tensor | None = None,
        dropout: DropoutKeys | None = None,
    ) -> Tensor:
        """[B, T, D] to the same shape; the mask is 0 where the encoder's tokens are padding.

        An encoder's block attends to its own sequence under that mask (there S = T), a decoder's within segments and to
        the encoder's features under the mask. With the layer's dropout keys, elements are dropped.
        """
        mask_BT = padding_mask_BS if self.cross is None else None
        attended_BTD = self.attn(
            self.attn_norm(x_BTD),
            segment_ids_BT=segment_ids_BT,
            padding_mask_BT=mask_BT,
            bias_HTT=bias_HTT,
            dropout=dropout,
        )
        x_BTD = x_BTD + self.attn_dropout(attended_BTD, dropout)
        if self.cross is not None and self.cross_norm is not None and self.cross_dropout is not None:
            assert encoded_BSD is not None, "a decoder's block needs the encoder's features"
            attended_BTD = self.cross(self.cross_norm(x_BTD), encoded_BSD, padding_mask_BS, dropout)
            x_BTD = x_BTD + self.cross_dropout(attended_BTD, dropout)
        return x_BTD + self.mlp_dropout(self.mlp(self.mlp_norm(x_BTD)), dropout)


class TransformerStack(nn.Module):
    """The encoder or the decoder: blocks, the bias that their scores share, and the norm at the end, if any."""

    def __init__(self, config: T5Config, core: Core, tensor: int = 1, *, encoder: bool) -> None:
        super().__init__()
        count = config.stack_layers("encoder" if encoder else "decoder")
        heads, part = config.attention.heads, config.position
        self.relative = RelativeBias(part, heads, bidirectional=encoder) if part.kind == "relative" else None
        self.embed_dropout = HiddenDropout(config.dropout.embedding, EMBEDDING if encoder else DECODER_EMBEDDING)
        self.first_layer = 1 if encoder else 1 + config.layers
        self.layers = nn.ModuleDict({str(n): Block(config, core, tensor, encoder=encoder) for n in range(count)})
        self.norm = make_norm(config.norm, config.hidden_size) if config.final_norm else nn.Identity()

    def forward(
        self, x_BTD: Tensor, length: int, run: Run, dropout: DropoutKeys | None = None, **inputs: Tensor | None
    ) -> Tensor:
        """[B, T, D] to the same shape, of sequences of so many tokens; each block gets the inputs too."""
        bias_HTT = None if self.relative is None else self.relative(length)
        x_BTD = self.embed_dropout(x_BTD, *split_layers(dropout, 0, 1))
        layers = zip(self.layers.values(), split_layers(dropout, self.first_layer, len(self.layers)), strict=True)
        return self.norm(
            run([partial(block, bias_HTT=bias_HTT, dropout=keys, **inputs) for block, keys in layers], x_BTD)
        )


class T5(Transformer[T5Config]):
    """The encoder's and the decoder's tokens to logits of the decoder's next token."""

    batch_keys = MappingProxyType(
        {
            "text_dec": BatchKey("tokens_BT", required=True, per_token=True),
            "text_enc": BatchKey("encoder_tokens_BS", required=True),
            "enc_mask": BatchKey("encoder_padding_mask_BS"),
            "labels": BatchKey("labels_BT", required=True, per_token=True),
            "position_ids": BatchKey("positions", per_token=True),
            "segment_ids": BatchKey("segment_ids_BT", per_token=True),
            "dec_mask": BatchKey(None),  # the decoder's padding is at the end, where causal attention never reaches it
            "truncated": BatchKey(None),
            "dropout_keys": BatchKey("dropout_keys_B"),
        }
    )

    def __init__(self, config: T5Config, tensor: int = 1) -> None:
        """`tensor` ranks will share the model: vocabulary rows and repeated key/value groups are made to fit."""
        super().__init__(config)
        D, rows = config.hidden_size, config.vocab_rows(tensor)
        self.embed = Embedding(rows, D)
        self.position = Embedding(config.max_seq_len, D) if config.position.kind == "learned" else None
        biased = ["biased"] if config.position.kind == "relative" else []
        core = self.choose_core(self.embed.weight.device, "bidirectional", *biased)
        self.encoder = TransformerStack(config, core, tensor, encoder=True)
        self.decoder = TransformerStack(config, core, tensor, encoder=False)
        has_head = config.head_bias or not config.tied
        self.head = Head(rows, D, weight=not config.tied, bias=config.head_bias) if has_head else None
        self.loss = CrossEntropy(config.vocab_size)

    @property
    def layers(self) -> Mapping[str, nn.Module]:
        """All blocks, the encoder's first."""
        stacks = {"encoder": self.encoder, "decoder": self.decoder}
        return {f"{name}.{n}": block for name, stack in stacks.items() for n, block in stack.layers.items()}

    def forward(
        self, tokens_BS: Tensor, decoder_tokens_BT: Tensor | None = None, padding_mask_BS: Tensor | None = None
    ) -> Tensor:
        """Logits [B, T, V] for the token after each of the decoder's, which are the encoder's if not given."""
        decoder_tokens_BT = tokens_BS if decoder_tokens_BT is None else decoder_tokens_BT
        encoded_BSD = self.encode(tokens_BS, padding_mask_BS)
        return self.logits(self.decode(decoder_tokens_BT, encoded_BSD, padding_mask_BS=padding_mask_BS))

    def encode(
        self, tokens_BS: Tensor, padding_mask_BS: Tensor | None = None, dropout_keys_B: Tensor | None = None
    ) -> Tensor:
        """The encoder's features [B, S, D]; where the mask is 0 there is padding, which no token sees."""
        dropout = self.start_dropout(tokens_BS, dropout_keys_B)
        x_BSD = self.embed_tokens(tokens_BS)
        return self.encoder(x_BSD, tokens_BS.shape[1], self.run, dropout, padding_mask_BS=padding_mask_BS)

    def decode(
        self,
        tokens_BT: Tensor,
        encoded_BSD: Tensor,
        *,
        padding_mask_BS: Tensor | None = None,
        segment_ids_BT: Tensor | None = None,
        positions: Tensor | None = None,
        dropout_keys_B: Tensor | None = None,
    ) -> Tensor:
        """The decoder's features [B, T, D]; tokens see those before them of equal segment ids."""
        inputs = {"segment_ids_BT": segment_ids_BT, "encoded_BSD": encoded_BSD, "padding_mask_BS": padding_mask_BS}
        dropout = self.start_dropout(tokens_BT, dropout_keys_B)
        return self.decoder(self.embed_tokens(tokens_BT, positions), tokens_BT.shape[1], self.run, dropout, **inputs)

    def output(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, D] and bias [V] of the output layer, padding rows included."""
        return (self.embed.weight, None) if self.head is None else self.head.weights(self.embed.weight)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] to [B, T, V]; the logits of padding rows are cut off."""
        return F.linear(self.scale_features(x_BTD), *self.output())[..., : self.config.vocab_size]

    def scale_features(self, x_BTD: Tensor) -> Tensor:
        """The output layer's input."""
        return x_BTD / math.sqrt(self.config.hidden_size) if self.config.scaled_head else x_BTD

    def losses(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor,
        *,
        encoder_tokens_BS: Tensor,
        encoder_padding_mask_BS: Tensor | None = None,
        positions: Tensor | None = None,
        segment_ids_BT: Tensor | None = None,
        dropout_keys_B: Tensor | None = None,
    ) -> Losses:
        """Cross-entropy of the decoder's labels in nats, [B, T], in fp32 or wider; negative labels count as 0.

        Training with dropout needs the samples' keys, int32.
        """
        encoded_BSD = self.encode(encoder_tokens_BS, encoder_padding_mask_BS, dropout_keys_B)
        x_BTD = self.decode(
            tokens_BT,
            encoded_BSD,
            padding_mask_BS=encoder_padding_mask_BS,
            segment_ids_BT=segment_ids_BT,
            positions=positions,
            dropout_keys_B=dropout_keys_B,
        )
        weight_VD, bias_V = self.output()
        losses_BT = self.loss(self.scale_features(x_BTD), weight_VD, labels_BT.clamp(min=0), bias_V)
        return Losses(losses_BT, tokens_name=SPAN_LOSS)
