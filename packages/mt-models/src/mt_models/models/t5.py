"""T5: an encoder, and a decoder that also attends to the encoder's features (arXiv:1910.10683).

Positions are numbers added to scores, shared by the layers of a stack, or as in Megatron vectors added to embeddings.
In a pipeline the encoder's layers come before the decoder's, and its features pass through the decoder's stages.

Shape suffixes: B batch, S tokens of the encoder, T tokens of the decoder or of either, D model size, H heads,
V vocabulary (its true size; padding rows never reach a logit).
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mt_core.contracts import BatchKey, EdgeTensor, Losses, StageOutput
from mt_core.parallel.dropout import DropoutKeys
from mt_core.pipeline.layout_string import Stage
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
from mt_models.models.base import FEATURES, Run, Transformer, keep_blocks, split_layers

SPAN_LOSS = "span_loss"
"""Name of the metric: the mean loss of the words of hidden spans."""
ENCODED = "encoded"
"""The name of the encoder's features that the decoder's stages of a pipeline pass on beside their own."""


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

    def drop_embedded(self, x_BTD: Tensor, dropout: DropoutKeys | None) -> Tensor:
        """The first block's input, [B, T, D], from embedded tokens."""
        return self.embed_dropout(x_BTD, *split_layers(dropout, 0, 1))

    def forward(
        self, x_BTD: Tensor, numbers: range, length: int, run: Run, dropout: DropoutKeys | None, **inputs: Tensor | None
    ) -> Tensor:
        """Pass [B, T, D], of sequences of so many tokens, through the blocks of these numbers; each gets the inputs."""
        bias_HTT = None if self.relative is None else self.relative(length)
        layers = zip(numbers, split_layers(dropout, self.first_layer + numbers.start, len(numbers)), strict=True)
        blocks = [
            partial(self.layers[str(number)], bias_HTT=bias_HTT, dropout=keys, **inputs) for number, keys in layers
        ]
        return run(blocks, x_BTD)

    def keep_blocks(self, ranges: Sequence[range], *, norm: bool) -> None:
        """Drop the blocks whose numbers are in none of the ranges, what they share if none is left, and the norm."""
        keep_blocks(self.layers, ranges)
        dropped = ([] if len(self.layers) else ["relative"]) + ([] if norm else ["norm"])
        for name in dropped:
            setattr(self, name, None)


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
        x_BSD = self.encoder.drop_embedded(self.embed_tokens(tokens_BS), dropout)
        return self.encode_layers(x_BSD, range(self.config.layers), tokens_BS, padding_mask_BS, dropout)

    def encode_layers(
        self,
        x_BSD: Tensor,
        numbers: range,
        tokens_BS: Tensor,
        padding_mask_BS: Tensor | None,
        dropout: DropoutKeys | None,
    ) -> Tensor:
        """Pass features [B, S, D] through some of the encoder's blocks, and behind the last one through its norm."""
        x_BSD = self.encoder(x_BSD, numbers, tokens_BS.shape[1], self.run, dropout, padding_mask_BS=padding_mask_BS)
        return self.encoder.norm(x_BSD) if self.config.layers - 1 in numbers else x_BSD

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
        x_BTD = self.decoder.drop_embedded(self.embed_tokens(tokens_BT, positions), dropout)
        numbers = range(self.config.decoder_layers)
        return self.decoder.norm(self.decoder(x_BTD, numbers, tokens_BT.shape[1], self.run, dropout, **inputs))

    def output(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, D] and bias [V] of the output layer, padding rows included."""
        return (self.embed.weight, None) if self.head is None else self.head.weights(self.embed)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] to [B, T, V]; the logits of padding rows are cut off."""
        return F.linear(self.scale_features(x_BTD), *self.output())[..., : self.config.vocab_size]

    def scale_features(self, x_BTD: Tensor) -> Tensor:
        """The output layer's input."""
        return x_BTD / math.sqrt(self.config.hidden_size) if self.config.scaled_head else x_BTD

    def keep_stages(self, stages: Sequence[Stage]) -> None:
        """Drop the blocks and the ends that none of these stages has; what embeds the decoder's tokens, or is tied to
        the head, keeps the embedding."""
        numbers = [self.config.split_layers(stage.layers) for stage in stages]
        encoder, decoder = [encoder for encoder, _ in numbers], [decoder for _, decoder in numbers]
        embeds = any(stage.embedding for stage in stages) or any(0 in each for each in decoder)
        last = any(stage.loss for stage in stages)
        self.encoder.keep_blocks(encoder, norm=any(self.config.layers - 1 in each for each in encoder))
        self.decoder.keep_blocks(decoder, norm=last)
        dropped = [*([] if embeds else ["position"]), *([] if last else ["head", "loss"])]
        dropped += [] if embeds or (last and self.config.tied) else ["embed"]
        for name in dropped:
            setattr(self, name, None)

    def edge_tensors(self, stage: Stage, arguments: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, EdgeTensor]:
        """Features of the encoder [B, S, D], or of the decoder [B, T, D] with those of the encoder beside them, as long
        as blocks follow that attend to them."""
        D = self.config.hidden_size
        encoded = EdgeTensor((*arguments["encoder_tokens_BS"].shape, D), dtype)
        if stage.layers.stop <= self.config.layers:
            return {FEATURES: encoded}
        features = {FEATURES: EdgeTensor((*arguments["tokens_BT"].shape, D), dtype)}
        return features if stage.layers.stop == self.config.total_layers else features | {ENCODED: encoded}

    def run_stage(
        self,
        stage: Stage,
        edge: Mapping[str, Tensor],
        *,
        tokens_BT: Tensor,
        labels_BT: Tensor,
        encoder_tokens_BS: Tensor,
        encoder_padding_mask_BS: Tensor | None = None,
        positions: Tensor | None = None,
        segment_ids_BT: Tensor | None = None,
        dropout_keys_B: Tensor | None = None,
    ) -> StageOutput:
        """Pass a micro-batch through one stage, of the encoder, of the decoder or of both; the last one returns the
        losses: cross-entropy of the decoder's labels in nats, [B, T], in fp32 or wider; negative labels count as 0.

        Training with dropout needs the samples' keys, int32.
        """
        passed, (encoder, decoder) = dict(edge), self.config.split_layers(stage.layers)
        if stage.embedding or encoder:
            dropout = self.start_dropout(encoder_tokens_BS, dropout_keys_B)
            if stage.embedding:
                passed[FEATURES] = self.encoder.drop_embedded(self.embed_tokens(encoder_tokens_BS), dropout)
            passed[FEATURES] = self.encode_layers(
                passed[FEATURES], encoder, encoder_tokens_BS, encoder_padding_mask_BS, dropout
            )
        if decoder:
            dropout = self.start_dropout(tokens_BT, dropout_keys_B)
            if decoder.start == 0:
                passed[ENCODED] = passed[FEATURES]
                passed[FEATURES] = self.decoder.drop_embedded(self.embed_tokens(tokens_BT, positions), dropout)
            inputs = {"segment_ids_BT": segment_ids_BT, "padding_mask_BS": encoder_padding_mask_BS}
            passed[FEATURES] = self.decoder(
                passed[FEATURES], decoder, tokens_BT.shape[1], self.run, dropout, encoded_BSD=passed[ENCODED], **inputs
            )
        if not stage.loss:
            names = (FEATURES, ENCODED) if 0 < decoder.stop < self.config.decoder_layers else (FEATURES,)
            return StageOutput({name: passed[name] for name in names}, Losses())
        weight_VD, bias_V = self.output()
        x_BTD = self.scale_features(self.decoder.norm(passed[FEATURES]))
        losses_BT = self.loss(x_BTD, weight_VD, labels_BT.clamp(min=0), bias_V)
        return StageOutput({}, Losses(losses_BT, tokens_name=SPAN_LOSS))
