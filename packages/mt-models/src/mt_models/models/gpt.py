"""GPT: a decoder-only transformer composed of the parts that `GPTConfig` names. Single-device code throughout.

Shape suffixes: B batch, T tokens, D model size, V vocabulary (its true size; padding rows never reach a logit).
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
from mt_core.parallel.tensor.cross_entropy import cap_logits
from mt_core.pipeline.layout_string import Stage
from mt_models.config import GPTConfig
from mt_models.layers.attention import Attention
from mt_models.layers.attention_cores import Core
from mt_models.layers.basic import CrossEntropy, Embedding, Linear, make_norm
from mt_models.layers.decode_pass import DecodeLayer, DecodePass
from mt_models.layers.dropout import ATTENTION_OUTPUT, EMBEDDING, MLP_OUTPUT, HiddenDropout
from mt_models.layers.kv_cache import CachePass, KVCache, LayerCache
from mt_models.layers.mla import LatentAttention
from mt_models.layers.mlp import make_mlp
from mt_models.layers.rope import Rotation, make_rotation
from mt_models.layers.router_losses import RoutingRecord, attach_aux_losses, sum_aux_losses
from mt_models.models.base import FEATURES, Transformer, count_positions, keep_parts, split_layers

AUX_LOSSES = "aux_losses"
"""The name of the auxiliary losses that a stage of a pipeline passes on beside the features."""


class Block(nn.Module):
    """Residual block: attention, then a feed-forward layer, each after a norm; post-norms also come before the sum."""

    def __init__(self, config: GPTConfig, core: Core, tensor: int = 1, layer: int = 0) -> None:
        super().__init__()
        self.attn_norm = make_norm(config.norm, config.hidden_size)
        self.attn = make_attention(config, core, tensor, layer)
        self.mlp_norm = make_norm(config.norm, config.hidden_size)
        self.mlp = make_mlp(config.get_mlp(layer), config.hidden_size, config.lora)
        self.attn_post_norm, self.mlp_post_norm = (
            make_norm(config.norm, config.hidden_size) if config.post_norms else nn.Identity() for _ in range(2)
        )
        self.attn_dropout = HiddenDropout(config.dropout.hidden, ATTENTION_OUTPUT)
        self.mlp_dropout = HiddenDropout(config.dropout.hidden, MLP_OUTPUT)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: Rotation | None,
        cache: LayerCache | DecodeLayer | None = None,
        segment_ids_BT: Tensor | None = None,
        record: RoutingRecord | None = None,
        dropout: DropoutKeys | None = None,
    ) -> Tensor:
        """[B, T, D] to the same shape; a mixture of experts leaves its router's losses in the record.

        With the layer's dropout keys, elements are dropped, and jittered.
        """
        y_BTD = self.attn(self.attn_norm(x_BTD), rotation, cache, segment_ids_BT, dropout=dropout)
        x_BTD = x_BTD + self.attn_dropout(self.attn_post_norm(y_BTD), dropout)
        y_BTD = self.mlp(self.mlp_norm(x_BTD), record, dropout)
        return x_BTD + self.mlp_dropout(self.mlp_post_norm(y_BTD), dropout)


def make_attention(config: GPTConfig, core: Core, tensor: int, layer: int) -> nn.Module:
    """The attention layer that the configuration describes."""
    if config.attention.kind == "mla":
        return LatentAttention(config, config.attention, core)
    return Attention(config, core, tensor, layer, lora=config.lora)


class GPT(Transformer[GPTConfig]):
    """Tokens to next-token logits. Parameters are uninitialised until `initialize` or a load."""

    batch_keys = MappingProxyType(
        {
            "tokens": BatchKey("tokens_BT", required=True, per_token=True),
            "labels": BatchKey("labels_BT", required=True, per_token=True),
            "position_ids": BatchKey("positions", per_token=True),
            "segment_ids": BatchKey("segment_ids_BT", per_token=True),
            "padding_mask": BatchKey("padding_mask_BT", per_token=True),
            "dropout_keys": BatchKey("dropout_keys_B"),
            "row_positions": BatchKey("row_positions_T"),
        }
    )

    def __init__(self, config: GPTConfig, tensor: int = 1) -> None:
        """`tensor` ranks will share the model: vocabulary rows and repeated key/value groups are made to fit."""
        super().__init__(config)
        D, rows = config.hidden_size, config.vocab_rows(tensor)
        self.embed = Embedding(rows, D)
        self.position = Embedding(config.max_seq_len, D) if config.position.kind == "learned" else None
        self.embed_dropout = HiddenDropout(config.dropout.embedding, EMBEDDING)
        core = self.choose_core(self.embed.weight.device)
        self.layers = nn.ModuleDict({str(n): Block(config, core, tensor, n) for n in range(config.layers)})
        self.norm = make_norm(config.norm, D)
        self.head = None if config.tied else Linear(D, rows)
        self.loss = CrossEntropy(config.vocab_size, config.logit_softcap)

    def forward(self, tokens_BT: Tensor, cache: CachePass | DecodePass | None = None) -> Tensor:
        """Logits [B, T, V] for the token after each; with a cache tokens are rows [N, 1] of the sequences it says."""
        return self.logits(self.hidden(tokens_BT, cache=cache, dropout=self.start_dropout(tokens_BT, None)))

    def token_losses(self, tokens_BT: Tensor, labels_BT: Tensor, **inputs: Tensor) -> Tensor:
        """Cross-entropy of each label in nats, [B, T], in fp32 or wider; inputs are those of `run_stage`."""
        losses_BT = self.losses(tokens_BT, labels_BT, **inputs).tokens
        assert losses_BT is not None
        return losses_BT

    def hidden(
        self,
        tokens_BT: Tensor,
        positions: Tensor | None = None,
        cache: CachePass | DecodePass | None = None,
        dropout: DropoutKeys | None = None,
    ) -> Tensor:
        """Final normalised features [B, T, D]; `MtError` if a sequence is longer than `max_seq_len`."""
        if cache is not None:
            self.check_length(cache.length)
            positions = cache.positions_N1
        positions = count_positions(tokens_BT, positions)
        x_BTD = self.embed_inputs(tokens_BT, positions, dropout)
        return self.norm(self.run_layers(x_BTD, positions, cache, dropout=dropout))

    def embed_inputs(self, tokens_BT: Tensor, positions: Tensor, dropout: DropoutKeys | None = None) -> Tensor:
        """The first layer's input, [B, T, D], after dropout."""
        return self.embed_dropout(self.embed_tokens(tokens_BT, positions), *split_layers(dropout, 0, 1))

    def embed_tokens(self, tokens_BT: Tensor, positions: Tensor | None = None) -> Tensor:
        """The first layer's input before dropout, [B, T, D]; `MtError` if a sequence is longer than `max_seq_len`."""
        self.check_length(tokens_BT.shape[1])
        x_BTD = self.embed(tokens_BT)
        if self.config.scaled_embedding:
            x_BTD = x_BTD * round_to_dtype(math.sqrt(self.config.hidden_size), x_BTD.dtype)
        return x_BTD if self.position is None else x_BTD + self.position(count_positions(tokens_BT, positions))

    def run_layers(
        self,
        x_BTD: Tensor,
        positions: Tensor,
        cache: CachePass | DecodePass | None = None,
        segment_ids_BT: Tensor | None = None,
        records: Sequence[RoutingRecord] | None = None,
        dropout: DropoutKeys | None = None,
        numbers: range | None = None,
    ) -> Tensor:
        """Pass features [B, T, D] at these positions through all layers, or through those of these numbers."""
        rotation = self.rotation(positions, x_BTD.dtype)
        numbers = range(self.config.layers) if numbers is None else numbers
        caches = [None] * len(numbers) if cache is None else cache.layers
        noted = [None] * len(numbers) if records is None else records
        inputs = {"rotation": rotation, "segment_ids_BT": segment_ids_BT}
        keys = split_layers(dropout, 1 + numbers.start, len(numbers))
        layers = [
            partial(self.layers[str(number)], cache=layer_cache, record=record, dropout=layer_keys, **inputs)
            for number, layer_cache, record, layer_keys in zip(numbers, caches, noted, keys, strict=True)
        ]
        return self.run(layers, x_BTD)

    def keep_stages(self, stages: Sequence[Stage]) -> None:
        """Drop the layers and the ends that none of these stages has; a head without weight keeps the embedding."""
        ends = (("position", "embed_dropout"), ("norm", "head", "loss"))
        keep_parts(self, self.layers, stages, ends, tied=self.config.tied)

    def edge_tensors(self, stage: Stage, arguments: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, EdgeTensor]:
        """Features [B, T, D] between stages, and beside those the auxiliary losses so far, [B], if there are any."""
        samples, length = arguments["tokens_BT"].shape
        edge = {FEATURES: EdgeTensor((samples, length, self.config.hidden_size), dtype)}
        if self.config.mlp.kind == "moe" and self.config.mlp.has_aux_losses:
            wide = torch.promote_types(dtype, torch.float32)
            edge[AUX_LOSSES] = EdgeTensor((samples,), wide, per_token=False)
        return edge

    def run_stage(
        self,
        stage: Stage,
        edge: Mapping[str, Tensor],
        *,
        tokens_BT: Tensor,
        labels_BT: Tensor,
        positions: Tensor | None = None,
        segment_ids_BT: Tensor | None = None,
        padding_mask_BT: Tensor | None = None,
        dropout_keys_B: Tensor | None = None,
        row_positions_T: Tensor | None = None,
    ) -> StageOutput:
        """Pass a micro-batch through one stage; the last one returns the cross-entropy of each label.

        `positions` are [T] or [B, T], 0, 1, 2, … if not given. Tokens see only those of equal segment ids. Where the
        padding mask is 0 no expert runs, and no router's loss counts. Training with dropout needs the samples' keys,
        int32, and the tokens' indices in their rows unless those are 0, 1, 2, ….
        """
        records = [RoutingRecord(padding_mask_BT) for _ in stage.layers]
        dropout = self.start_dropout(tokens_BT, dropout_keys_B, row_positions_T)
        positions = count_positions(tokens_BT, positions)
        x_BTD = self.embed_inputs(tokens_BT, positions, dropout) if stage.embedding else edge[FEATURES]
        x_BTD = self.run_layers(x_BTD, positions, None, segment_ids_BT, records, dropout, stage.layers)
        aux_B = sum_aux_losses((edge.get(AUX_LOSSES), *(record.loss_B for record in records)))
        if stage.loss:
            losses_BT = self.loss(self.norm(x_BTD), self.output_weight, labels_BT)
            return StageOutput({}, Losses(attach_aux_losses(losses_BT, aux_B)))
        passed = {FEATURES: x_BTD}
        for name, (shape, dtype, _) in self.edge_tensors(stage, {"tokens_BT": tokens_BT}, x_BTD.dtype).items():
            if name == AUX_LOSSES:
                passed[name] = x_BTD.new_zeros(shape, dtype=dtype) if aux_B is None else aux_B
        return StageOutput(passed, Losses())

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation | None:
        """Rotary angles of the positions, in fp32 or wider; None when the model has no rotary positions."""
        part = self.config.position
        if part.kind != "rope":
            return None
        wide = torch.promote_types(dtype, torch.float32)
        size = self.config.attention.rotary_size
        return make_rotation(positions, size, theta=part.theta, dtype=wide, scaling=part.scaling)

    @property
    def output_weight(self) -> Tensor:
        """[V, D], padding rows included."""
        return self.embed.weight if self.head is None else self.head.weight

    def logits(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] to [B, T, V]: the matrix product includes padding rows, whose logits are cut off."""
        return cap_logits(F.linear(x_BTD, self.output_weight)[..., : self.config.vocab_size], self.config.logit_softcap)

    def make_cache(self, blocks: int, block_size: int) -> KVCache:
        """A KV cache on this model's device and in its dtype, for the layers and groups of heads that this rank has."""
        weight, numbers = next(self.parameters()), [int(number) for number in self.layers]
        layer = self.layers[str(numbers[0])].attn
        groups = len(layer.qkv.weight) if isinstance(layer, Attention) else None
        return KVCache(
            self.config,
            blocks,
            block_size,
            groups=groups,
            layers=range(numbers[0], numbers[-1] + 1),
            dtype=weight.dtype,
            device=weight.device,
        )


def round_to_dtype(value: float, dtype: torch.dtype) -> float:
    """The nearest value that a tensor of this dtype can hold."""
    return torch.tensor(value, dtype=dtype, device="cpu").item()
