"""Attention cores: the part of attention that mixes positions, as functions chosen by name.

`mt_core.contracts.AttentionCore` is how one is called and what it computes. What else a model does to its scores is
`ScoreMods`; a core that supports none of it never gets them. Which keys a query sees: in a causal core those up to its
own position, with `segment_ids_BS` only those of its own segment; in a bidirectional core all of them, with
`padding_mask_BS` only those that are no padding (1 for a token, 0 for padding).

Shape suffixes: B batch, T queries, S keys, H = G·R query heads, G key/value groups, R queries per group, K head size.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mt_core.contracts import AttentionCore
from mt_core.errors import MtError
from mt_core.parallel.dropout import ProbabilityDropout, drop_probabilities
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
class ScoreMods:
    """What happens to q·k before the softmax; plain when nothing is set."""

    scale: float | None = None
    """Their factor; 1 / √K unless set."""
    softcap: float | None = None
    """Scaled scores s become softcap · tanh(s / softcap)."""
    window: int | None = None
    """Keys that a query sees, its own included."""
    bidirectional: bool = False
    """Queries see the keys after them too; the keys may be another sequence's."""
    biased: bool = False
    """Every call brings a number to be added to each scaled score, [H, T, S]."""

    @property
    def special(self) -> frozenset[str]:
        """What is set."""
        return frozenset(field.name for field in fields(self) if getattr(self, field.name) != field.default)


PLAIN = ScoreMods()


@dataclass(frozen=True, slots=True)
class Core:
    """What a component of kind `attention` is, and whether it runs here."""

    attend: Callable[..., Tensor]
    """An `AttentionCore`; it takes `scores=` if it supports any, with `bidirectional` also `padding_mask_BS=`, and with
    `biased` also `bias_HTS=`."""
    preference: int
    """`auto` takes the core with the highest preference among those that run."""
    why_not: Callable[[torch.device], str] = lambda device: ""
    """Why the core cannot run on a device, in a few words; empty if it can."""
    supports: frozenset[str] = frozenset()
    """Fields of `ScoreMods` that the core can apply, and "dropout" if it takes `dropout=`."""

    def __call__(self, *tensors: Tensor | None, **more: Tensor) -> Tensor:
        """Attend without special scores, like any `AttentionCore`."""
        return self.attend(*tensors, **more)

    def with_scores(self, scores: ScoreMods) -> AttentionCore:
        """The core for these scores."""
        return partial(self.attend, scores=scores) if scores.special else self

    def unsupported_reason(self, device: torch.device, needed: frozenset[str]) -> str:
        """Why the core cannot do what is needed on a device; empty if it can."""
        if reason := self.why_not(device):
            return reason
        missing = sorted(needed - self.supports)
        return f"has no {', '.join(missing)}" if missing else ""


def visible(
    queries: int, keys: int, device: torch.device, segment_ids_BS: Tensor | None = None, *, window: int | None = None
) -> Tensor:
    """Which keys each query of a causal core sees: boolean [T, S], or [B, 1, T, S] with segment ids."""
    causal_TS = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    if window is not None:
        causal_TS = causal_TS.triu(keys - queries - window + 1)
    if segment_ids_BS is None:
        return causal_TS
    return causal_TS & (segment_ids_BS[:, None, -queries:, None] == segment_ids_BS[:, None, None, :])


def visible_keys(
    q_BTHK: Tensor, k_BSGK: Tensor, segment_ids_BS: Tensor | None, padding_mask_BS: Tensor | None, scores: ScoreMods
) -> Tensor | None:
    """Which keys each query sees, as booleans that broadcast to [B, 1, T, S]; None if all see all."""
    if not scores.bidirectional:
        assert padding_mask_BS is None, "causal cores take segment ids"
        return visible(q_BTHK.shape[1], k_BSGK.shape[1], q_BTHK.device, segment_ids_BS, window=scores.window)
    assert segment_ids_BS is None, "bidirectional cores take a padding mask"
    return None if padding_mask_BS is None else padding_mask_BS[:, None, None, :] > 0


def attend_eager(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    segment_ids_BS: Tensor | None = None,
    *,
    padding_mask_BS: Tensor | None = None,
    bias_HTS: Tensor | None = None,
    scores: ScoreMods = PLAIN,
    dropout: ProbabilityDropout | None = None,
) -> Tensor:
    """Attention written out; the softmax is computed in fp32 or wider."""
    G = k_BSGK.shape[2]
    q_BTGRK = q_BTHK.unflatten(2, (G, -1))
    scores_BGRTS = torch.einsum("btgrk,bsgk->bgrts", q_BTGRK, k_BSGK) * (scores.scale or q_BTHK.shape[-1] ** -0.5)
    if scores.softcap is not None:
        scores_BGRTS = scores.softcap * torch.tanh(scores_BGRTS / scores.softcap)
    if bias_HTS is not None:
        scores_BGRTS = scores_BGRTS + bias_HTS.unflatten(0, (G, -1))
    if (seen := visible_keys(q_BTHK, k_BSGK, segment_ids_BS, padding_mask_BS, scores)) is not None:
        scores_BGRTS = scores_BGRTS.masked_fill(~(seen if seen.ndim == 2 else seen[:, :, None]), -math.inf)
    wide = torch.promote_types(scores_BGRTS.dtype, torch.float32)
    weights_BGRTS = scores_BGRTS.softmax(dim=-1, dtype=wide)
    if dropout is not None:
        weights_BGRTS = drop_probabilities(weights_BGRTS, dropout)
    weights_BGRTS = weights_BGRTS.to(v_BSGK.dtype)
    return torch.einsum("bgrts,bsgk->btgrk", weights_BGRTS, v_BSGK).flatten(2, 3)


def attend_sdpa(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    segment_ids_BS: Tensor | None = None,
    *,
    padding_mask_BS: Tensor | None = None,
    bias_HTS: Tensor | None = None,
    scores: ScoreMods = PLAIN,
    dropout: ProbabilityDropout | None = None,
) -> Tensor:
    """torch's fused attention; attention written out with dropout, since torch draws its masks from a generator.

    Its `is_causal` aligns first query with first key, so T < S needs a mask, T = 1 none.
    """
    if dropout is not None:
        more = {"padding_mask_BS": padding_mask_BS, "bias_HTS": bias_HTS, "scores": scores, "dropout": dropout}
        return attend_eager(q_BTHK, k_BSGK, v_BSGK, segment_ids_BS, **more)
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    windowed = scores.window is not None and scores.window < S
    masked = scores.bidirectional or segment_ids_BS is not None or bias_HTS is not None or windowed or 1 < T < S
    seen = visible_keys(q_BTHK, k_BSGK, segment_ids_BS, padding_mask_BS, scores) if masked else None
    if bias_HTS is not None:
        seen = bias_HTS[None] if seen is None else torch.where(seen, bias_HTS[None], -math.inf)
    with sdpa_kernel(BACKENDS, set_priority=True):
        y_BHTK = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK)),
            attn_mask=seen,
            is_causal=T == S and not masked,
            scale=scores.scale,
            enable_gqa=q_BTHK.shape[2] != k_BSGK.shape[2],
        )
    return y_BHTK.transpose(1, 2)


BOTH = frozenset({"scale", "window", "bidirectional", "biased", "dropout"})
eager = Core(attend_eager, preference=0, supports=BOTH | {"softcap"})
sdpa = Core(attend_sdpa, preference=10, supports=BOTH)


def choose_core(name: str, device: torch.device, needed: frozenset[str] = frozenset()) -> Core:
    """The core called `name`, or for "auto" the preferred one that runs on `device` and supports what is needed; says
    which in the log."""
    if name != "auto":
        core: Core = component("attention", name)
        if reason := core.unsupported_reason(device, needed):
            raise MtError(f"attention core {name!r}", f"cannot run on {device.type}: {reason}", 'use "auto"')
        return core
    loaded = {candidate: component("attention", candidate) for candidate in components("attention")}
    reasons = {candidate: core.unsupported_reason(device, needed) for candidate, core in loaded.items()}
    chosen = max((c for c in loaded if not reasons[c]), key=lambda c: loaded[c].preference)
    refused = "".join(f"; not {c}: {reason}" for c, reason in reasons.items() if reason)
    logger.info("attention core: %s (auto, %s)%s", chosen, device.type, refused)
    return loaded[chosen]
