"""BERT: a bidirectional transformer, pre- or post-normalised, with heads for hidden words and the order of two parts.

Without heads it is an encoder: a feature vector for each token (arXiv:1810.04805).

Shape suffixes: B batch, T tokens, D model size, V vocabulary (its true size; padding rows never reach a logit).
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mt_models.config import BertConfig
from mt_models.layers.attention import Attention
from mt_models.layers.attention_cores import Core
from mt_models.layers.basic import CrossEntropy, Embedding, Head, Linear, make_norm
from mt_models.layers.mlp import ACTIVATIONS, make_mlp
from mt_models.models.base import Transformer


class Block(nn.Module):
    """Residual block: attention, then a feed-forward layer, each after a norm or before one of the sum."""

    def __init__(self, config: BertConfig, core: Core, tensor: int = 1) -> None:
        super().__init__()
        self.attn_norm = make_norm(config.norm, config.hidden_size)
        self.attn = Attention(config, core, tensor, bidirectional=True)
        self.mlp_norm = make_norm(config.norm, config.hidden_size)
        self.mlp = make_mlp(config.mlp, config.hidden_size)
        self.norm_after = config.norm_place == "after"

    def forward(self, x_BTD: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """[B, T, D] to the same shape; where `documents_BT` is 0 there is padding, which nobody sees."""
        if self.norm_after:
            x_BTD = self.attn_norm(x_BTD + self.attn(x_BTD, documents_BT=documents_BT))
            return self.mlp_norm(x_BTD + self.mlp(x_BTD))
        x_BTD = x_BTD + self.attn(self.attn_norm(x_BTD), documents_BT=documents_BT)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class Prediction(nn.Module):
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

    def __init__(self, config: BertConfig, tensor: int = 1) -> None:
        """`tensor` ranks will share the model: vocabulary rows and repeated key/value groups are made to fit."""
        super().__init__(config)
        D, rows = config.hidden_size, config.vocab_rows(tensor)
        self.embed, self.position = Embedding(rows, D), Embedding(config.max_seq_len, D)
        self.token_type = Embedding(config.token_types, D) if config.token_types else None
        core, after = self.core(self.embed.weight.device, "bidirectional"), config.norm_place == "after"
        self.embed_norm = make_norm(config.norm, D) if after else nn.Identity()
        self.layers = nn.ModuleDict({str(n): Block(config, core, tensor) for n in range(config.layers)})
        self.norm = nn.Identity() if after else make_norm(config.norm, D)
        self.lm_head = Prediction(config) if config.lm_head else None
        self.head = Head(rows, D, weight=False, bias=True) if config.lm_head else None
        self.pooler = Linear(D, D, bias=True) if config.pooler else None
        self.binary_head = Linear(D, 2, bias=True) if config.binary_head else None
        self.loss = CrossEntropy(config.vocab_size)

    def forward(self, tokens_BT: Tensor, types_BT: Tensor | None = None, documents_BT: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of the token at each place; features [B, T, D] of a model without language-model head."""
        x_BTD = self.hidden(tokens_BT, types_BT, documents_BT)
        return x_BTD if self.lm_head is None else self.logits(x_BTD)

    def hidden(
        self,
        tokens_BT: Tensor,
        types_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Features [B, T, D]; types are 0 and positions 0, 1, 2, … if not given, and where `documents_BT` is 0 there
        is padding. `MtError` if a sequence is longer than `max_seq_len`."""
        self.check_length(tokens_BT.shape[1])
        if positions is None:
            positions = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.embed(tokens_BT) + self.position(positions)
        if self.token_type is not None:
            x_BTD = x_BTD + self.token_type(torch.zeros_like(tokens_BT) if types_BT is None else types_BT)
        layers = [partial(block, documents_BT=documents_BT) for block in self.layers.values()]
        return self.norm(self.run(layers, self.embed_norm(x_BTD)))

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Of the language-model head: [B, T, D] to [B, T, V]; the logits of padding rows are cut off."""
        assert self.lm_head is not None, "model.lm_head is off"
        return F.linear(self.lm_head(x_BTD), *self.output())[..., : self.config.vocab_size]

    def output(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, D] and bias [V] of the output layer, padding rows included."""
        return (self.embed.weight, None) if self.head is None else self.head.weights(self.embed.weight)

    def pooled(self, x_BTD: Tensor) -> Tensor:
        """tanh(dense(features of the first token)), [B, D]."""
        assert self.pooler is not None, "model.pooler is off"
        return self.pooler(x_BTD[:, 0]).tanh()

    def order_logits(self, x_BTD: Tensor) -> Tensor:
        """Of the binary head, [B, 2]."""
        assert self.binary_head is not None, "model.binary_head is off"
        return self.binary_head(self.pooled(x_BTD))

    def token_losses(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor,
        *,
        positions: Tensor | None = None,
        documents_BT: Tensor | None = None,
        types_BT: Tensor | None = None,
        order_B: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Cross-entropy of each label in nats, [B, T], in fp32 or wider, not reduced; negative labels count as 0.

        With `order_B`, 1 where the two parts are exchanged, also the cross-entropy of the binary head, [B].
        """
        assert self.lm_head is not None, "rules refuse to train without model.lm_head"
        x_BTD = self.hidden(tokens_BT, types_BT, documents_BT, positions)
        weight_VD, bias_V = self.output()
        losses_BT = self.loss(self.lm_head(x_BTD), weight_VD, labels_BT.clamp(min=0), bias_V)
        if order_B is None or self.binary_head is None:
            return losses_BT
        logits_BX = self.order_logits(x_BTD)
        wide = torch.promote_types(logits_BX.dtype, torch.float32)
        return losses_BT, F.cross_entropy(logits_BX.to(wide), order_B, reduction="none")
