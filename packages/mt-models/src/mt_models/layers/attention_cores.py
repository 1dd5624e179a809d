"""Attention cores: the part of attention that mixes positions, as functions chosen by name.

A core is causal: of S keys and T ≤ S queries, query i sits at position S − T + i and sees keys up to there. With
`documents_BS`, a number for each key's token, tokens see only those of their own document.

Shape suffixes: B batch, T queries, S keys, H = G·R query heads, G key/value groups, R queries per group, K head size.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mt_core.errors import MtError
from mt_core.plugins import component, components

logger = logging.getLogger(__name__)

BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""torch's attention kernels, the fastest on recent GPUs first; torch takes the first that runs."""


@dataclass(frozen=True, slots=True)
class Core:
    """What a component of kind `attention` is, and whether it runs here."""

    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    """(q_BTHK, k_BSGK, v_BSGK, documents_BS or None) to y_BTHK."""
    preference: int
    """`auto` takes the core with the highest preference among those that run."""
    why_not: Callable[[torch.device], str] = lambda device: ""
    """Why the core cannot run on a device, in a few words; empty if it can."""

    def __call__(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, documents_BS: Tensor | None = None) -> Tensor:
        """softmax(q kᵀ / √K + mask) v."""
        return self.attend(q_BTHK, k_BSGK, v_BSGK, documents_BS)


def visible(queries: int, keys: int, device: torch.device, documents_BS: Tensor | None = None) -> Tensor:
    """Which keys each query sees: boolean [T, S], or [B, 1, T, S] with documents."""
    causal_TS = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    if documents_BS is None:
        return causal_TS
    return causal_TS & (documents_BS[:, None, -queries:, None] == documents_BS[:, None, None, :])


def attend_eager(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, documents_BS: Tensor | None = None) -> Tensor:
    """Attention written out; the softmax is computed in fp32 or wider."""
    T, S, G = q_BTHK.shape[1], k_BSGK.shape[1], k_BSGK.shape[2]
    q_BTGRK = q_BTHK.unflatten(2, (G, -1))
    scores_BGRTS = torch.einsum("btgrk,bsgk->bgrts", q_BTGRK, k_BSGK) / math.sqrt(q_BTHK.shape[-1])
    seen = visible(T, S, q_BTHK.device, documents_BS)
    scores_BGRTS = scores_BGRTS.masked_fill(~(seen if documents_BS is None else seen[:, :, None]), -math.inf)
    wide = torch.promote_types(scores_BGRTS.dtype, torch.float32)
    weights_BGRTS = scores_BGRTS.softmax(dim=-1, dtype=wide).to(v_BSGK.dtype)
    return torch.einsum("bgrts,bsgk->btgrk", weights_BGRTS, v_BSGK).flatten(2, 3)


def attend_sdpa(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, documents_BS: Tensor | None = None) -> Tensor:
    """torch's fused attention. Its `is_causal` aligns first query with first key, so T < S needs a mask, T = 1 none."""
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    masked = documents_BS is not None or 1 < T < S
    with sdpa_kernel(BACKENDS, set_priority=True):
        y_BHTK = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK)),
            attn_mask=visible(T, S, q_BTHK.device, documents_BS) if masked else None,
            is_causal=T == S and not masked,
            enable_gqa=q_BTHK.shape[2] != k_BSGK.shape[2],
        )
    return y_BHTK.transpose(1, 2)


eager = Core(attend_eager, preference=0)
sdpa = Core(attend_sdpa, preference=10)


def choose_core(name: str, device: torch.device) -> Core:
    """The core called `name`, or for "auto" the preferred one that runs on `device`; says which in the log."""
    if name != "auto":
        core: Core = component("attention", name)
        if reason := core.why_not(device):
            raise MtError(f"attention core {name!r}", f"cannot run on {device.type}: {reason}", 'use "auto"')
        return core
    loaded = {candidate: component("attention", candidate) for candidate in components("attention")}
    reasons = {candidate: core.why_not(device) for candidate, core in loaded.items()}
    chosen = max((c for c in loaded if not reasons[c]), key=lambda c: loaded[c].preference)
    refused = "".join(f"; not {c}: {reason}" for c, reason in reasons.items() if reason)
    logger.info("attention core: %s (auto, %s)%s", chosen, device.type, refused)
    return loaded[chosen]
