"""BERT: a bidirectional transformer, pre- or post-normalised, with heads for hidden words and the order of two parts,
or one for a task on whole texts.

Without heads it is an encoder: a feature vector for each token (arXiv:1810.04805).

Shape suffixes: B batch, T tokens, D model size, V vocabulary (its true size; padding rows never reach a logit),
C classes or choices. Where a task compares choices, tokens, types and padding mask are [B, C, T], and layers see B · C
texts.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mt_core.contracts import BatchKey, EdgeTensor, Losses, MetricSum, StageOutput
from mt_core.parallel.dropout import DropoutKeys
from mt_core.pipeline.layout_string import Stage
from mt_models.config import HEAD_MODULES, BertConfig
from mt_models.layers.attention import Attention
from mt_models.layers.attention_cores import Core
from mt_models.layers.basic import CrossEntropy, Embedding, Head, Linear, make_norm
from mt_models.layers.dropout import ATTENTION_OUTPUT, EMBEDDING, MLP_OUTPUT, HiddenDropout
from mt_models.layers.mlp import ACTIVATIONS, make_mlp
from mt_models.layers.task_head import (
    FirstToken,
    compute_class_losses,
    compute_squared_errors,
    count_choices,
    drop_pooled,
    flatten_choices,
    split_choices,
)
from mt_models.models.base import FEATURES, Transformer, keep_parts, split_layers

MASKED_LM_LOSS, SENTENCE_ORDER_LOSS = "masked_lm_loss", "sentence_order_loss"
SENTENCE_ORDER_ACCURACY = "sentence_order_accuracy"
"""Names of the metrics: the mean losses of hidden words and of the order of two parts, and how often that is right."""


class Block(nn.Module):
    """Residual block: attention, then a feed-forward layer, each after a norm or before one of the sum."""

    def __init__(self, config: BertConfig, core: Core, tensor: int = 1) -> None:
        super().__init__()
        self.attn_norm = make_norm(config.norm, config.hidden_size)
        self.attn = Attention(config, core, tensor, bidirectional=True)
        self.mlp_norm = make_norm(config.norm, config.hidden_size)
        self.mlp = make_mlp(config.mlp, config.hidden_size)
        self.norm_after = config.norm_place == "after"
        self.attn_dropout = HiddenDropout(config.dropout.hidden, ATTENTION_OUTPUT)
        self.mlp_dropout = HiddenDropout(config.dropout.hidden, MLP_OUTPUT)

    def forward(
        self, x_BTD: Tensor, padding_mask_BT: Tensor | None = None, dropout: DropoutKeys | None = None
    ) -> Tensor:
        """[B, T, D] to the same shape; where the mask is 0 there is padding, which no token sees. With the layer's
        dropout keys, elements are dropped."""
        normed_BTD = x_BTD if self.norm_after else self.attn_norm(x_BTD)
        y_BTD = self.attn(normed_BTD, padding_mask_BT=padding_mask_BT, dropout=dropout)
        x_BTD = x_BTD + self.attn_dropout(y_BTD, dropout)
        if self.norm_after:
            x_BTD = self.attn_norm(x_BTD)
            return self.mlp_norm(x_BTD + self.mlp_dropout(self.mlp(x_BTD), dropout))
        return x_BTD + self.mlp_dropout(self.mlp(self.mlp_norm(x_BTD)), dropout)


class LMHeadTransform(nn.Module):
    """What the language-model head does before the output layer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=True)
        self.norm = make_norm(config.norm, config.hidden_size)
        self.activation = ACTIVATIONS[config.head_activation or config.mlp.activation]

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] to the same shape."""
        return self.norm(self.activation(self.dense(x_BTD)))


class Bert(Transformer[BertConfig]):
    """Tokens to features, and to the logits of the heads that the configuration names."""

    batch_keys = MappingProxyType(
        {
            "text": BatchKey("tokens_BT", required=True, per_token=True),
            "labels": BatchKey("labels_BT", required=True, per_token=True),
            "types": BatchKey("types_BT", per_token=True),
            "padding_mask": BatchKey("padding_mask_BT", per_token=True),
            "position_ids": BatchKey("positions", per_token=True),
            "is_random": BatchKey("is_random_next_B"),
            "truncated": BatchKey(None),
            "dropout_keys": BatchKey("dropout_keys_B"),
        }
    )

    def __init__(self, config: BertConfig, tensor: int = 1) -> None:
        """`tensor` ranks will share the model: vocabulary rows and repeated key/value groups are made to fit."""
        super().__init__(config)
        D, rows = config.hidden_size, config.vocab_rows(tensor)
        self.embed, self.position = Embedding(rows, D), Embedding(config.max_seq_len, D)
        self.token_type = Embedding(config.token_types, D) if config.token_types else None
        core, after = self.choose_core(self.embed.weight.device, "bidirectional"), config.norm_place == "after"
        self.embed_norm = make_norm(config.norm, D) if after else nn.Identity()
        self.embed_dropout = HiddenDropout(config.dropout.embedding, EMBEDDING)
        self.layers = nn.ModuleDict({str(n): Block(config, core, tensor) for n in range(config.layers)})
        self.norm = nn.Identity() if after else make_norm(config.norm, D)
        self.lm_head = LMHeadTransform(config) if config.lm_head else None
        self.head = Head(rows, D, weight=False, bias=True) if config.lm_head else None
        self.pooler = Linear(D, D, bias=True) if config.pooler else None
        self.first_token = FirstToken()
        self.binary_head = Linear(D, 2, bias=True) if config.binary_head else None
        self.task_head = Linear(D, config.task_head.logits, bias=True) if config.task_head else None
        self.loss = CrossEntropy(config.vocab_size)

    def forward(
        self, tokens_BT: Tensor, types_BT: Tensor | None = None, padding_mask_BT: Tensor | None = None
    ) -> Tensor:
        """Logits [B, T, V] of the token at each place, or [B, C] of a task; features [B, T, D] of a model without these
        heads."""
        x_BTD = self.hidden(tokens_BT, types_BT, padding_mask_BT)
        if self.task_head is not None:
            return self.task_logits(x_BTD, count_choices(tokens_BT))
        return x_BTD if self.lm_head is None else self.logits(x_BTD)

    def hidden(
        self,
        tokens_BT: Tensor,
        types_BT: Tensor | None = None,
        padding_mask_BT: Tensor | None = None,
        positions: Tensor | None = None,
        dropout_keys_B: Tensor | None = None,
    ) -> Tensor:
        """Features [B, T, D]; types are 0 and positions 0, 1, 2, … if not given, and where the mask is 0 there is
        padding. `MtError` if a sequence is longer than `max_seq_len`, or training with dropout lacks the keys."""
        dropout = self.start_dropout(tokens_BT, dropout_keys_B)
        x_BTD = self.embed_inputs(tokens_BT, types_BT, positions, dropout)
        return self.norm(self.run_layers(x_BTD, padding_mask_BT, dropout))

    def start_dropout(
        self, tokens_BT: Tensor, keys_B: Tensor | None, positions_T: Tensor | None = None
    ) -> DropoutKeys | None:
        """What masks depend on in training; each choice of a sample has keys of its own."""
        keys_N = split_choices(keys_B, count_choices(tokens_BT))
        return super().start_dropout(flatten_choices(tokens_BT), keys_N, positions_T)

    def embed_inputs(
        self, tokens_BT: Tensor, types_BT: Tensor | None, positions: Tensor | None, dropout: DropoutKeys | None
    ) -> Tensor:
        """The first layer's input, [B, T, D], after dropout."""
        tokens_BT = flatten_choices(tokens_BT)
        x_BTD = self.embed_tokens(tokens_BT, positions)
        if self.token_type is not None:
            types_BT = torch.zeros_like(tokens_BT) if types_BT is None else flatten_choices(types_BT)
            x_BTD = x_BTD + self.token_type(types_BT)
        return self.embed_dropout(self.embed_norm(x_BTD), *split_layers(dropout, 0, 1))

    def run_layers(
        self,
        x_BTD: Tensor,
        padding_mask_BT: Tensor | None = None,
        dropout: DropoutKeys | None = None,
        numbers: range | None = None,
    ) -> Tensor:
        """Pass features [B, T, D] through all layers, or through those of these numbers."""
        numbers = range(self.config.layers) if numbers is None else numbers
        padding_mask_BT = None if padding_mask_BT is None else flatten_choices(padding_mask_BT)
        layers = zip(numbers, split_layers(dropout, 1 + numbers.start, len(numbers)), strict=True)
        blocks = [
            partial(self.layers[str(number)], padding_mask_BT=padding_mask_BT, dropout=keys) for number, keys in layers
        ]
        return self.run(blocks, x_BTD)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Logits of the language-model head: [B, T, D] to [B, T, V]; those of padding rows are cut off."""
        assert self.lm_head is not None, "model.lm_head is off"
        return F.linear(self.lm_head(x_BTD), *self.output())[..., : self.config.vocab_size]

    def output(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, D] and bias [V] of the output layer, padding rows included."""
        return (self.embed.weight, None) if self.head is None else self.head.weights(self.embed)

    def pooled(self, x_BTD: Tensor) -> Tensor:
        """tanh(dense(features of the first token)), [B, D]."""
        assert self.pooler is not None, "model.pooler is off"
        return self.pooler(self.first_token(x_BTD)).tanh()

    def nsp_logits(self, x_BTD: Tensor) -> Tensor:
        """Logits of the binary head (next sentence prediction), [B, 2]."""
        assert self.binary_head is not None, "model.binary_head is off"
        return self.binary_head(self.pooled(x_BTD))

    def task_logits(self, x_BTD: Tensor, choices: int = 1, dropout: DropoutKeys | None = None) -> Tensor:
        """Logits [B, C] of the task's head, whose texts are so many for each sample where it compares choices."""
        assert self.task_head is not None, "model.task_head is not there"
        behind = split_layers(dropout, 1 + self.config.layers, 1)[0]
        logits = self.task_head(drop_pooled(self.pooled(x_BTD), self.config.dropout.hidden, behind))
        return logits.view(-1, choices) if choices > 1 else logits

    def keep_stages(self, stages: Sequence[Stage]) -> None:
        """Drop the layers and the ends that none of these stages has; the last one keeps the embedding for its head."""
        before = ("position", "token_type", "embed_norm", "embed_dropout")
        behind = ("norm", *HEAD_MODULES, "first_token", "loss")
        keep_parts(self, self.layers, stages, (before, behind), tied=self.config.lm_head)

    def edge_tensors(self, stage: Stage, arguments: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, EdgeTensor]:
        """Features [B, T, D] between stages."""
        shape = flatten_choices(arguments["tokens_BT"]).shape
        return {FEATURES: EdgeTensor((*shape, self.config.hidden_size), dtype)}

    def run_stage(
        self,
        stage: Stage,
        edge: Mapping[str, Tensor],
        *,
        tokens_BT: Tensor,
        labels_BT: Tensor,
        positions: Tensor | None = None,
        padding_mask_BT: Tensor | None = None,
        types_BT: Tensor | None = None,
        is_random_next_B: Tensor | None = None,
        dropout_keys_B: Tensor | None = None,
    ) -> StageOutput:
        """Pass a micro-batch through one stage; the last one returns the losses.

        Those are the cross-entropy of each label in nats, [B, T], in fp32 or wider, negative labels counting as 0; with
        `is_random_next_B`, 1 where the two parts are exchanged, also that of the binary head, [B], and how often it is
        right. With a task's head labels are the classes of samples, or their numbers, [B], and so are the losses.
        """
        dropout = self.start_dropout(tokens_BT, dropout_keys_B)
        x_BTD = self.embed_inputs(tokens_BT, types_BT, positions, dropout) if stage.embedding else edge[FEATURES]
        x_BTD = self.run_layers(x_BTD, padding_mask_BT, dropout, stage.layers)
        if stage.loss:
            choices = count_choices(tokens_BT)
            return StageOutput({}, self.head_losses(self.norm(x_BTD), labels_BT, is_random_next_B, choices, dropout))
        return StageOutput({FEATURES: x_BTD}, Losses())

    def head_losses(
        self,
        x_BTD: Tensor,
        labels_BT: Tensor,
        is_random_next_B: Tensor | None,
        choices: int = 1,
        dropout: DropoutKeys | None = None,
    ) -> Losses:
        """The losses of the heads from the last features, as `run_stage` describes them."""
        if self.task_head is not None:
            assert self.config.task_head is not None
            compute = compute_squared_errors if self.config.task_head.kind == "regression" else compute_class_losses
            return compute(self.task_logits(x_BTD, choices, dropout), labels_BT)
        assert self.lm_head is not None, "rules refuse to train without model.lm_head"
        weight_VD, bias_V = self.output()
        losses_BT = self.loss(self.lm_head(x_BTD), weight_VD, labels_BT.clamp(min=0), bias_V)
        if is_random_next_B is None or self.binary_head is None:
            return Losses(losses_BT, tokens_name=MASKED_LM_LOSS)
        logits_BX = self.nsp_logits(x_BTD)
        logits_BX = logits_BX.to(torch.promote_types(logits_BX.dtype, torch.float32))
        losses_B = F.cross_entropy(logits_BX, is_random_next_B, reduction="none")
        hits_B = (logits_BX.argmax(-1) == is_random_next_B).to(logits_BX.dtype)
        metrics = {SENTENCE_ORDER_ACCURACY: MetricSum(hits_B.sum(), torch.ones_like(hits_B).sum())}
        return Losses(losses_BT, losses_B, metrics, MASKED_LM_LOSS, SENTENCE_ORDER_LOSS)
