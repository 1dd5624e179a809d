"""One further token of each of some sequences, for a pass that is recorded once and run many times.

Everything that differs between passes is in one tensor, so shapes and addresses stay: for each row a token, its
position and a table of blocks. Rows that are not needed have a block that is nobody's. With the kernels of
`decode_kernels` a row reads no more keys than it has; without, in plain torch, it gathers all that its table can list.

Shape suffixes: N rows, P blocks of a table, S = P · block size keys, H query heads, G key/value groups, K features of a
key, V of a value.
"""

from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mt_models.config import GPTConfig
from mt_models.layers.attention_cores import PLAIN, ScoreMods
from mt_models.layers.kv_cache import KVCache
from mt_models.layers.paged_attention import attend_cached
from mt_models.layers.rope import Rotation, rotate

DTYPES, HEAD_SIZES = (torch.float32, torch.bfloat16, torch.float16), (16, 32, 64, 128, 256)
"""What the kernels compute with."""


class DecodePass:
    """What a model needs for the pass over these rows: int32 [N, 2 + P] with token, position and blocks of each."""

    def __init__(self, cache: KVCache, rows: Tensor, *, kernels: bool) -> None:
        self.cache = cache
        self.tokens_N1, self.positions_N1 = rows[:, :1].long(), rows[:, 1:2].long()
        self.tables_NP, size = rows[:, 2:], cache.block_size
        blocks_N1 = self.tables_NP.gather(1, self.positions_N1 // size).long()
        self.slots_N = (blocks_N1 * size + self.positions_N1 % size)[:, 0]
        self.kernels = import_kernels() if kernels else None
        self.length = 0
        """Sequences are checked where rows are written, as positions are not known on the host here."""

    @cached_property
    def layers(self) -> list["DecodeLayer"]:
        """The part of each layer."""
        return [DecodeLayer(self, layer) for layer in range(len(self.cache.windows))]

    @cached_property
    def gathered(self) -> dict[int | None, tuple[Tensor, Tensor]]:
        """For each window of a layer the blocks to gather, and the keys [N, 1, S] that are hidden."""
        blocks, size = self.tables_NP, self.cache.block_size
        firsts_G11 = torch.arange(self.cache.k.shape[1], device=blocks.device)[:, None, None] * self.cache.blocks
        behind_NS = self.positions_N1 - torch.arange(blocks.shape[1] * size, device=blocks.device)
        hidden = {window: behind_NS < 0 for window in {*self.cache.windows}}
        hidden = {w: h if w is None else h | (behind_NS >= w) for w, h in hidden.items()}
        return {window: ((firsts_G11 + blocks).flatten(), each[:, None]) for window, each in hidden.items()}


class DecodeLayer:
    """One layer's blocks in a pass."""

    def __init__(self, step: DecodePass, layer: int) -> None:
        cache = step.cache
        self.step, self.window = step, cache.windows[layer]
        self.k, self.v = cache.k[layer], None if cache.v is None else cache.v[layer]

    def attend(
        self,
        q_N1HK: Tensor,
        k_N1GK: Tensor,
        v_N1GV: Tensor | None,
        *,
        scores: ScoreMods = PLAIN,
        values: int = 0,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """Do what `LayerCache.attend` does."""
        step, kernels = self.step, self.step.kernels
        if kernels is None:
            return self._attend_plainly(q_N1HK, k_N1GK, v_N1GV, scores, values, rotation)
        assert v_N1GV is not None, "kernels are for keys and values apart"
        caches = self.k, self.v
        q_NHK = kernels.store_rotated((q_N1HK[:, 0], k_N1GK[:, 0], v_N1GV[:, 0]), rotation, step.slots_N, caches)
        scale = scores.scale or q_NHK.shape[-1] ** -0.5
        options = {"scale": scale, "softcap": scores.softcap, "window": self.window}
        return kernels.attend_pages(q_NHK, caches, step.tables_NP, step.positions_N1, **options)[:, None]

    def _attend_plainly(
        self, q: Tensor, k: Tensor, v: Tensor | None, scores: ScoreMods, values: int, rotation: Rotation | None
    ) -> Tensor:
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        gathered: list[Tensor] = []
        blocks, hidden_N1S = self.step.gathered[self.window]
        for stored, new in ((self.k, k), (self.v, v)):
            if stored is not None and new is not None:
                stored.flatten(1, 2).index_copy_(1, self.step.slots_N, new[:, 0].transpose(0, 1).to(stored.dtype))
                rows = stored.flatten(0, 1).flatten(1).index_select(0, blocks)
                gathered.append(rows.view(len(stored), len(q), -1, stored.shape[-1]))
        k_GNSK, v_GNSV = gathered if len(gathered) > 1 else (gathered[0], gathered[0][..., :values])
        return attend_cached(q, k_GNSK, v_GNSV, hidden_N1S, scores, exact=False)


def import_kernels() -> Any:
    """The kernels in Triton."""
    from mt_models.layers import decode_kernels

    return decode_kernels


def supports_kernels(config: GPTConfig, weight: Tensor) -> bool:
    """Whether the kernels run a model with such weights: on a GPU, with heads that are tiles of its products."""
    part = config.attention
    if weight.device.type != "cuda" or weight.dtype not in DTYPES or part.kind != "gqa":
        return False
    return part.head_size in HEAD_SIZES and find_spec("triton") is not None
