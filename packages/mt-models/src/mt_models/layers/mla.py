"""Multi-head latent attention, written for one device (arXiv:2405.04434, §2.1).

The latent is expanded to keys and values of every head before the attention core. In generation only the latents and
the shared rotary features of keys are cached, and attended to without being expanded.

Shape suffixes: B batch, T tokens, S tokens so far, D model size, H heads, Q and C features of compressed queries and of
the latent, N features of a head without positions, L those that are rotated, K = N + L, V features of a value head.
Under tensor parallelism H is this rank's share, and no line changes.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mt_core.parallel.dropout import DropoutKeys, pass_dropout
from mt_core.parallel.tensor.plan import Column, Plan, Row, Sequence
from mt_core.parallel.tensor.shared_features import share_features
from mt_models.config import MLA, GPTConfig
from mt_models.fusion import Fusion
from mt_models.layers.attention_cores import Core, ScoreMods
from mt_models.layers.basic import Linear, make_norm
from mt_models.layers.decode_pass import DecodeLayer
from mt_models.layers.dropout import ATTENTION, AttentionDropout
from mt_models.layers.kv_cache import LayerCache
from mt_models.layers.rope import Rotation, rotate


class SharedKey(nn.Module):
    """The features of keys that all heads have in common, passed on to heads that tensor ranks may divide."""

    def __init__(self) -> None:
        super().__init__()
        self.op: Callable[[Tensor], Tensor] = share_features

    def forward(self, k_BTL: Tensor) -> Tensor:
        """[B, T, L] to the same shape; under sequence parallelism from this rank's part of the T tokens."""
        return self.op(k_BTL)


class LatentAttention(nn.Module):
    """Causal self-attention whose keys and values are expanded from one latent of each token."""

    def __init__(self, config: GPTConfig, part: MLA, core: Core) -> None:
        super().__init__()
        self.part, D, norm = part, config.hidden_size, part.get_norm(config.norm)
        heads = (part.heads, part.head_size)
        if part.q_lora_rank is None:
            self.q = Linear(D, heads)
        else:
            self.q_down = Linear(D, part.q_lora_rank)
            self.q_norm = make_norm(norm, part.q_lora_rank)
            self.q_up = Linear(part.q_lora_rank, heads)
        self.kv_down = Linear(D, part.kv_lora_rank + part.rope_head_size)
        self.kv_norm = make_norm(norm, part.kv_lora_rank)
        self.kv_up = Linear(part.kv_lora_rank, (part.heads, part.nope_head_size + part.v_head_size))
        self.shared_key = SharedKey()
        self.out = Linear((part.heads, part.v_head_size), D)
        self.core: Callable[..., Tensor] = core
        self.q_factor = get_query_factor(config, part)
        self.dropout = AttentionDropout(config.dropout.attention, ATTENTION)
        rows = {"q.weight": part.head_size, "q_up.weight": part.head_size}
        rows["kv_up.weight"] = part.nope_head_size + part.v_head_size
        self.fusions = {name: _flatten_outputs(size) for name, size in rows.items()}
        self.fusions["out.weight"] = Fusion(None, lambda out: (out.flatten(1),), _unflatten_inputs(part.v_head_size))

    def forward(
        self,
        x_BTD: Tensor,
        rotation: Rotation | None = None,
        cache: LayerCache | DecodeLayer | None = None,
        segment_ids_BT: Tensor | None = None,
        *,
        dropout: DropoutKeys | None = None,
    ) -> Tensor:
        """[B, T, D] to the same shape; with a cache each row is a token of the sequence that the cache says."""
        q_BTHK = self.project_queries(x_BTD, rotation)
        latent_BSC, k_BSL = self.compress(x_BTD, rotation)
        if cache is not None:
            return self.out(self.attend_latents(q_BTHK, torch.cat((latent_BSC, k_BSL), -1), cache))
        k_BSHN, v_BSHV = self.kv_up(latent_BSC).split((self.part.nope_head_size, self.part.v_head_size), -1)
        k_BSHK = torch.cat((k_BSHN, k_BSL[:, :, None].expand(-1, -1, k_BSHN.shape[2], -1)), -1)
        more = pass_dropout(self.dropout(dropout, q_BTHK.shape[2]))
        return self.out(self.core(q_BTHK, k_BSHK, v_BSHV, segment_ids_BT, **more))

    def attend_latents(self, q_BTHK: Tensor, key_BTX: Tensor, cache: LayerCache | DecodeLayer) -> Tensor:
        """Attend to cached latents as they are, [B, T, H, V]: what would expand them is applied to queries and results.

        A key is the latent and the shared features, X = C + L (arXiv:2405.04434, §2.1.2).
        """
        N = self.part.nope_head_size
        up_HNC, up_HVC = self.kv_up.weight.split((N, self.part.v_head_size), 1)
        absorbed = [F.linear(q_BTN, up_NC.mT) for q_BTN, up_NC in zip(q_BTHK[..., :N].unbind(2), up_HNC, strict=True)]
        q_BTHX = torch.cat((torch.stack(absorbed, 2), q_BTHK[..., N:]), -1)
        scores = ScoreMods(scale=self.part.head_size**-0.5)
        y_BTHC = cache.attend(q_BTHX, key_BTX[:, :, None], None, scores=scores, values=self.part.kv_lora_rank)
        expanded = [F.linear(y_BTC, up_VC) for y_BTC, up_VC in zip(y_BTHC.unbind(2), up_HVC, strict=True)]
        return torch.stack(expanded, 2)

    def project_queries(self, x_BTD: Tensor, rotation: Rotation | None) -> Tensor:
        """Queries [B, T, H, K], rotated where they are to be; a scale that cores do not have is a factor of theirs."""
        q_BTHK = self.q(x_BTD) if self.part.q_lora_rank is None else self.q_up(self.q_norm(self.q_down(x_BTD)))
        if self.q_factor != 1:
            q_BTHK = q_BTHK * self.q_factor
        if rotation is None:
            return q_BTHK
        q_BTHN, q_BTHL = q_BTHK.split((self.part.nope_head_size, self.part.rope_head_size), -1)
        return torch.cat((q_BTHN, rotate(q_BTHL, rotation)), -1)

    def compress(self, x_BTD: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """The normalised latent, and the rotated features that keys of all heads share: what a cache keeps.

        Under sequence parallelism the latent is of this rank's tokens, which the next projection gathers.
        """
        latent_BTC, k_BTL = self.kv_down(x_BTD).split((self.part.kv_lora_rank, self.part.rope_head_size), -1)
        k_BTL = self.shared_key(k_BTL)
        if rotation is not None:
            k_BTL = rotate(k_BTL[:, :, None], rotation)[:, :, 0]
        return self.kv_norm(latent_BTC), k_BTL


def get_query_factor(config: GPTConfig, part: MLA) -> float:
    """What the scale of scores is beside the cores' 1 / √K: YaRN sharpens them by `mscale_all_dim`."""
    if part.scale is not None:
        return part.scale * math.sqrt(part.head_size)
    scaling = config.position.scaling if config.position.kind == "rope" else None
    return scaling.sharpen(scaling.mscale_all_dim) ** 2 if scaling is not None and scaling.kind == "yarn" else 1.0


def _flatten_outputs(size: int) -> Fusion:
    """The fusion of a projection to heads of `size` features, [H, size, …], which is [H·size, …] in checkpoints."""
    return Fusion(None, lambda weight: (weight.flatten(0, 1),), lambda parts: parts[0].unflatten(0, (-1, size)))


def _unflatten_inputs(size: int) -> Callable[..., Tensor]:
    return lambda parts: parts[0].unflatten(1, (-1, size))


def plan(part: MLA) -> Plan:
    """Cut by head; what compresses, and its norms, is whole, and used on a part of the sequence where that is cut."""
    compressed = ("q_down", "q_norm") if part.q_lora_rank is not None else ()
    queries = "q" if part.q_lora_rank is None else "q_up"
    whole: Plan = {name: Sequence() for name in (*compressed, "kv_down", "kv_norm")}
    cut: Plan = {name: Column(dim=0) for name in (queries, "kv_up", "shared_key", "dropout")}
    return {**whole, **cut, "out": Row(dim=1)}
