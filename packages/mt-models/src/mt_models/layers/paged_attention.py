"""Attention to keys and values that were gathered from a cache: plain torch, for a few tokens of many sequences.

Where it is to be exact, a token's result depends on nothing but its query, its position and the keys before it, to the
last bit: not on the other sequences, and not on how a prompt was cut. Its products then have one shape wherever the
token stands: the queries that share a key in a few rows, padded to `QUERY_ROWS`; scores with padding keys behind them,
whose weight is 0; and weighted values summed up by tiles of `KEY_TILE` keys, which begin at the same positions always.

Shape suffixes: B sequences, T tokens of each, S keys, H = G·R query heads, G key/value groups, R queries per group, Q
rows of a product, K and V features of a key and a value.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mt_models.layers.attention_cores import ScoreMods

KEY_TILE = 128
"""Keys whose weighted values are summed in one product."""
QUERY_ROWS = 4
"""Rows of a product are a multiple of this: a single one is computed by another routine, in another order."""


def attend_cached(
    q_BTHK: Tensor, k_GBSK: Tensor, v_GBSV: Tensor, hidden_BTS: Tensor, scores: ScoreMods, *, exact: bool
) -> Tensor:
    """Attend to the keys that are not hidden, [B, T, H, V]; the softmax is computed in fp32 or wider.

    Where it is to be exact, several tokens are of one sequence. The window of the scores is in `hidden_BTS`.
    """
    B, T, H, _ = q_BTHK.shape
    assert B == 1 or T == 1 or not exact, "several sequences have one token each"
    G = len(k_GBSK)
    q_GBTRK = q_BTHK.unflatten(2, (G, -1)).permute(2, 0, 1, 3, 4)
    if not exact:
        y_GBQV = _attend_tile(q_GBTRK.flatten(2, 3), k_GBSK, v_GBSV, hidden_BTS, scores)
        y_GBTRV = y_GBQV.unflatten(2, (T, -1))
    else:
        R = H // G
        q_GBTQK = F.pad(q_GBTRK, (0, 0, 0, -R % QUERY_ROWS)).contiguous()
        if T == 1:
            y_GBTQV = _attend_tile(q_GBTQK[:, :, 0], k_GBSK, v_GBSV, hidden_BTS, scores)[:, :, None]
        else:  # each token is a sequence of its own with the same keys
            keys, values = (x.expand(-1, T, -1, -1) for x in (k_GBSK, v_GBSV))
            parts = [
                _attend_tile(
                    q_GBTQK[g : g + 1, 0], keys[g : g + 1], values[g : g + 1], hidden_BTS.transpose(0, 1), scores
                )
                for g in range(G)
            ]
            y_GBTQV = torch.cat(parts)[:, None]
        y_GBTRV = y_GBTQV[..., :R, :]
    return y_GBTRV.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _attend_tile(q_GBQK: Tensor, k_GBSK: Tensor, v_GBSV: Tensor, hidden_BTS: Tensor, scores: ScoreMods) -> Tensor:
    """Attention of rows [G, B, Q, K], T tokens after each other, to the keys of their sequence: [G, B, Q, V]."""
    T, scale = hidden_BTS.shape[1], scores.scale or q_GBQK.shape[-1] ** -0.5
    scores_GBQS = _multiply(q_GBQK, k_GBSK.mT).mul_(scale)
    if scores.softcap is not None:
        scores_GBQS = scores.softcap * torch.tanh(scores_GBQS / scores.softcap)
    scores_GBQS.unflatten(2, (T, -1)).masked_fill_(hidden_BTS[:, :, None], -math.inf)
    wide = torch.promote_types(scores_GBQS.dtype, torch.float32)
    weights_GBQS = scores_GBQS.softmax(-1, dtype=wide).to(v_GBSV.dtype)
    total = None
    for start in range(0, weights_GBQS.shape[-1], KEY_TILE):
        keys = slice(start, start + KEY_TILE)
        part_GBQV = _multiply(weights_GBQS[..., keys], v_GBSV[..., keys, :])
        total = part_GBQV if total is None else total.add_(part_GBQV)
    assert total is not None
    return total


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """Products of matrices [G, B, …], as one batch if that needs no copy, else one for each group."""
    G, B = a.shape[:2]
    if G == 1:
        return torch.bmm(a[0], b[0])[None]
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, (G, B))
