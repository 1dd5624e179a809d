"""Grouped-query attention, of a sequence to itself and to another, written for one device.

Shape suffixes: B batch, T tokens, S tokens so far or of the other sequence, D model size, G key/value groups,
R queries per group, H = G·R heads, K head size. A suffix names logical axes: under tensor parallelism G and H are this
rank's share, and no line changes.
"""

from collections.abc import Callable

from torch import Tensor, nn

from mt_core.parallel.dropout import DropoutKeys, pass_dropout
from mt_core.parallel.tensor.plan import Column, Heads, Plan, Row, Rule
from mt_models.config import GQA, TransformerConfig
from mt_models.config.attention import KV, QKV
from mt_models.config.lora import Lora
from mt_models.fusion import Fusion
from mt_models.layers.attention_cores import Core, ScoreMods
from mt_models.layers.basic import Linear, make_norm
from mt_models.layers.decode_pass import DecodeLayer
from mt_models.layers.dropout import ATTENTION, CROSS, AttentionDropout
from mt_models.layers.kv_cache import LayerCache
from mt_models.layers.lora import add_adapter, column_plan, make_adapter, make_linear, row_plan
from mt_models.layers.rope import Rotation, rotate
from mt_models.qkv_layout import fuse_kv, fuse_qkv, split_kv, split_qkv


class Attention(nn.Module):
    """Self-attention, causal or bidirectional; each of G groups has R query heads and one key and one value head."""

    def __init__(
        self,
        config: TransformerConfig,
        core: Core,
        tensor: int = 1,
        layer: int = 0,
        *,
        bidirectional: bool = False,
        biased: bool = False,
        lora: Lora | None = None,
    ) -> None:
        """`tensor` ranks will share it: more than there are groups, and the groups are repeated."""
        super().__init__()
        part, D = config.attention, config.hidden_size
        assert part.kind == "gqa"
        kv_replicas = part.count_kv_replicas(tensor)
        G, R = part.num_kv_heads * kv_replicas, part.queries_per_group // kv_replicas
        self.qkv = Linear(D, (G, R + 2, part.head_size), bias=part.qkv_bias)
        self.out = make_linear(lora, "out", (part.heads, part.head_size), D, bias=part.out_bias)
        self.q = make_adapter(lora, "q", D, (G, R, part.head_size))
        self.k, self.v = (make_adapter(lora, target, D, (G, part.head_size)) for target in "kv")
        self.q_norm, self.k_norm = (
            make_norm(config.norm, part.head_size) if part.qk_norm else nn.Identity() for _ in "qk"
        )
        scores = ScoreMods(part.scale, part.softcap, part.get_window(layer), bidirectional=bidirectional, biased=biased)
        self.core: Callable[..., Tensor] = core.with_scores(scores)
        self.scores = scores
        self.dropout = AttentionDropout(config.dropout.attention, ATTENTION)
        qkv = Fusion(QKV.parts, split_qkv, lambda parts: fuse_qkv(*parts, head_size=part.head_size))
        self.fusions = {"qkv.weight": qkv, "qkv.bias": qkv, "out.weight": _flatten_inputs(part)}
        self.fusions |= {
            "q.lora_b.weight": _flatten_outputs(R, part.head_size),
            "out.lora_a.weight": _flatten_inputs(part),
        }
        self.fusions |= {f"{target}.lora_b.weight": _flatten_outputs(part.head_size) for target in "kv"}

    def forward(
        self,
        x_BTD: Tensor,
        rotation: Rotation | None = None,
        cache: LayerCache | DecodeLayer | None = None,
        segment_ids_BT: Tensor | None = None,
        *,
        padding_mask_BT: Tensor | None = None,
        bias_HTT: Tensor | None = None,
        dropout: DropoutKeys | None = None,
    ) -> Tensor:
        """[B, T, D] to the same shape; with a cache each row is a token of the sequence that the cache says.

        Causal attention takes segment ids, bidirectional attention a padding mask. Dropout takes the layer's keys.
        """
        qkv_BTGXK = self.qkv(x_BTD)  # X = R + 2
        q_BTHK = add_adapter(qkv_BTGXK[..., :-2, :], self.q, x_BTD).flatten(2, 3)
        k_BSGK = add_adapter(qkv_BTGXK[..., -2, :], self.k, x_BTD)
        v_BSGK = add_adapter(qkv_BTGXK[..., -1, :], self.v, x_BTD)
        q_BTHK, k_BSGK = self.q_norm(q_BTHK), self.k_norm(k_BSGK)
        if cache is not None:
            return self.out(cache.attend(q_BTHK, k_BSGK, v_BSGK, scores=self.scores, rotation=rotation))
        if rotation is not None:
            q_BTHK, k_BSGK = rotate(q_BTHK, rotation), rotate(k_BSGK, rotation)
        more = {"padding_mask_BS": padding_mask_BT, "bias_HTS": bias_HTT}
        given = {name: tensor for name, tensor in more.items() if tensor is not None}  # plain cores take neither
        given |= pass_dropout(self.dropout(dropout, q_BTHK.shape[2]))
        y_BTHK = self.core(q_BTHK, k_BSGK, v_BSGK, segment_ids_BT, **given)
        return self.out(y_BTHK)  # the only operation that mixes heads, so the only reduction under tensor parallelism


class CrossAttention(nn.Module):
    """Attention to another sequence, all of it but its padding."""

    def __init__(self, config: TransformerConfig, core: Core, tensor: int = 1) -> None:
        """`tensor` ranks will share it: more than there are groups, and the groups are repeated."""
        super().__init__()
        part, D = config.attention, config.hidden_size
        assert part.kind == "gqa"
        self.q = Linear(D, (part.heads, part.head_size), bias=part.qkv_bias)
        self.kv = Linear(D, (part.num_kv_heads * part.count_kv_replicas(tensor), 2, part.head_size), bias=part.qkv_bias)
        self.out = Linear((part.heads, part.head_size), D, bias=part.out_bias)
        self.q_norm, self.k_norm = (
            make_norm(config.norm, part.head_size) if part.qk_norm else nn.Identity() for _ in "qk"
        )
        self.core: Callable[..., Tensor] = core.with_scores(ScoreMods(part.scale, part.softcap, bidirectional=True))
        self.dropout = AttentionDropout(config.dropout.attention, CROSS)
        kv = Fusion(KV.parts, split_kv, lambda parts: fuse_kv(*parts, head_size=part.head_size))
        q = Fusion(None, lambda q: (q.flatten(0, 1),), lambda parts: parts[0].unflatten(0, (-1, part.head_size)))
        self.fusions = {"q.weight": q, "q.bias": q, "kv.weight": kv, "kv.bias": kv, "out.weight": _flatten_inputs(part)}

    def forward(
        self, x_BTD: Tensor, others_BSD: Tensor, padding_mask_BS: Tensor | None, dropout: DropoutKeys | None = None
    ) -> Tensor:
        """[B, T, D] to the same shape; where `padding_mask_BS` is 0, the other sequence is padding."""
        k_BSGK, v_BSGK = self.kv(others_BSD).unbind(-2)
        q_BTHK, k_BSGK = self.q_norm(self.q(x_BTD)), self.k_norm(k_BSGK)
        given = pass_dropout(self.dropout(dropout, q_BTHK.shape[2], k_BSGK.shape[1]))
        return self.out(self.core(q_BTHK, k_BSGK, v_BSGK, padding_mask_BS=padding_mask_BS, **given))


def _flatten_inputs(part: GQA) -> Fusion:
    """The fusion of an output projection [D, H, K], which is [D, H·K] in checkpoints."""
    return Fusion(None, lambda out: (out.flatten(1),), lambda parts: parts[0].unflatten(1, (-1, part.head_size)))


def _flatten_outputs(*shape: int) -> Fusion:
    """The fusion of B of an adapter, [G, …, rank] with the dims of a group's outputs, which is [out, rank] in
    checkpoints."""
    return Fusion(None, lambda b: (b.flatten(0, -2),), lambda parts: parts[0].unflatten(0, (-1, *shape)))


def plan(part: GQA, kv_replicas: int = 1, lora: Lora | None = None) -> Plan:
    """Cut by group, and the output projection by head; keys and values of repeated groups are replicas."""
    qkv = Column(dim=0, kv_replicas=kv_replicas, num_replicated=2)
    adapters = {**column_plan(lora, "q", Column(dim=0)), **row_plan(lora, "out")}
    for target in "kv":
        adapters |= column_plan(lora, target, Column(0, kv_replicas=kv_replicas, num_replicated=part.head_size))
    return {"qkv": qkv, "out": Row(dim=1), "dropout": Column(dim=0), **_head_norms(part), **adapters}


def cross_plan(part: GQA, kv_replicas: int = 1) -> Plan:
    """The rules of `plan` for a layer whose queries are projected apart from its keys and values."""
    kv = Column(dim=0, kv_replicas=kv_replicas, num_replicated=2)
    return {"q": Column(dim=0), "kv": kv, "out": Row(dim=1), "dropout": Column(dim=0), **_head_norms(part)}


def _head_norms(part: GQA) -> dict[str, Rule]:
    return {"q_norm": Heads(), "k_norm": Heads()} if part.qk_norm else {}
