"""The KV cache: keys and values of the positions a model has already seen, for generation; of latent attention the
latents and the features that keys of all heads share, in their places.

Shape suffixes: B batch, T new tokens, S all tokens so far, G key/value groups, K head size.
"""

import torch
from torch import Tensor

from mt_core.errors import MtError
from mt_models.config import GPTConfig


class LayerCache:
    """One layer's keys and values, preallocated; the first `length` positions are filled."""

    def __init__(self, k_BSGK: Tensor, v_BSGK: Tensor) -> None:
        self.k_BSGK, self.v_BSGK = k_BSGK, v_BSGK
        self.length = 0

    def append(self, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """Store T more positions and return all so far, [B, S, G, K] each; the cache carries no gradient."""
        start, end, capacity = self.length, self.length + k_BTGK.shape[1], self.k_BSGK.shape[1]
        if end > capacity:
            raise MtError("KV cache", f"{end} positions do not fit", f"it was made for {capacity}")
        self.k_BSGK[:, start:end] = k_BTGK.detach()
        self.v_BSGK[:, start:end] = v_BTGK.detach()
        self.length = end
        return self.k_BSGK[:, :end], self.v_BSGK[:, :end]


class KVCache:
    """A `LayerCache` for each layer of a model."""

    def __init__(
        self,
        config: GPTConfig,
        batch: int,
        *,
        positions: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        shapes = [(batch, positions, *shape) for shape in config.attention.cache_shapes]
        self.layers = tuple(
            LayerCache(*(torch.empty(shape, dtype=dtype, device=device) for shape in shapes))
            for _ in range(config.layers)
        )

    @property
    def length(self) -> int:
        """Positions stored, the same in every layer between two forward passes."""
        return self.layers[0].length
