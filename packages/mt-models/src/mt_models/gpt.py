"""GPT: a decoder-only transformer composed of the parts that `GPTConfig` names. Single-device code throughout.

Shape suffixes: B batch, T tokens, D model size, V vocabulary (its true size; padding rows never reach a logit).
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mt_core.errors import MtError
from mt_models import canonical
from mt_models.config import GPTConfig
from mt_models.initialization import initial
from mt_models.layers.attention import Attention
from mt_models.layers.attention_cores import Core, choose_core
from mt_models.layers.cache import KVCache, LayerCache
from mt_models.layers.embedding import Embedding
from mt_models.layers.linear import Linear
from mt_models.layers.mlp import make_mlp
from mt_models.layers.norm import make_norm
from mt_models.layers.rope import Rotation, make_rotation


class Block(nn.Module):
    """Pre-normalised residual block: attention, then a feed-forward layer."""

    def __init__(self, config: GPTConfig, core: Core) -> None:
        super().__init__()
        self.attn_norm = make_norm(config.norm, config.model_size)
        self.attn = Attention(config, core)
        self.mlp_norm = make_norm(config.norm, config.model_size)
        self.mlp = make_mlp(config.mlp, config.model_size)

    def forward(self, x_BTD: Tensor, rotation: Rotation | None, cache: LayerCache | None = None) -> Tensor:
        """[B, T, D] to the same shape."""
        x_BTD = x_BTD + self.attn(self.attn_norm(x_BTD), rotation, cache)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class GPT(nn.Module):
    """Tokens to next-token logits. Parameters are uninitialised until `initialize` or a load."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        D, rows = config.model_size, config.padded_vocab_size
        self.embed = Embedding(rows, D)
        self.position = Embedding(config.max_positions, D) if config.position.kind == "learned" else None
        core = choose_core(config.attention.core, compute_device(self.embed.weight.device))
        self.layers = nn.ModuleDict({str(n): Block(config, core) for n in range(config.layers)})
        self.norm = make_norm(config.norm, D)
        self.head = None if config.tied else Linear(D, rows)

    def forward(self, tokens_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits [B, T, V] for the token after each; with a cache the tokens follow those already in it."""
        return self.logits(self.hidden(tokens_BT, cache))

    def hidden(self, tokens_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """Final normalised features [B, T, D]; `MtError` if positions run past `max_positions`."""
        positions_T = self.positions(tokens_BT, 0 if cache is None else cache.length)
        x_BTD = self.embed(tokens_BT)
        if self.position is not None:
            x_BTD = x_BTD + self.position(positions_T)
        rotation = self.rotation(positions_T, x_BTD.dtype)
        for n, block in self.layers.items():
            x_BTD = block(x_BTD, rotation, None if cache is None else cache.layers[int(n)])
        return self.norm(x_BTD)

    def positions(self, tokens_BT: Tensor, start: int) -> Tensor:
        """Absolute position of each of T tokens, the first at `start`."""
        end, allowed = start + tokens_BT.shape[1], self.config.max_positions
        if end > allowed:
            raise MtError("tokens", f"a sequence of {end} tokens", f"at most model.max_positions = {allowed}")
        return torch.arange(start, end, device=tokens_BT.device)

    def rotation(self, positions_T: Tensor, dtype: torch.dtype) -> Rotation | None:
        """Rotary angles of the positions, in fp32 or wider; None when the model has no rotary positions."""
        part = self.config.position
        if part.kind != "rope":
            return None
        wide = torch.promote_types(dtype, torch.float32)
        return make_rotation(positions_T, self.config.attention.head_size, theta=part.theta, dtype=wide)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] to [B, T, V]: the matrix product includes padding rows, whose logits are cut off."""
        weight_VD = self.embed.weight if self.head is None else self.head.weight
        return F.linear(x_BTD, weight_VD)[..., : self.config.vocab_size]

    def token_losses(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Cross-entropy of each label in nats, [B, T], in fp32 or wider, not reduced."""
        logits_BTV = self(tokens_BT)
        wide = torch.promote_types(logits_BTV.dtype, torch.float32)
        losses = F.cross_entropy(logits_BTV.flatten(0, 1).to(wide), labels_BT.flatten(), reduction="none")
        return losses.view_as(labels_BT)

    def make_cache(self, batch: int, positions: int) -> KVCache:
        """An empty KV cache on this model's device and in its dtype."""
        weight = self.embed.weight
        return KVCache(self.config, batch, positions=positions, dtype=weight.dtype, device=weight.device)

    def initialize(self, seed: int) -> None:
        """Fill every parameter; values depend on the seed and the parameter's canonical names only."""
        shapes = self.config.canonical_shapes()
        canonical.load_canonical(self, lambda name: initial(self.config, seed, name=name, shape=shapes[name]))

    def to_canonical(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        """Split a tensor shaped like parameter `name` (fused, padded) into canonical ones."""
        return canonical.to_canonical(self.config, name, tensor)

    def from_canonical(self, name: str, get: Callable[[str], Tensor]) -> Tensor:
        """The reverse: a tensor shaped like parameter `name` from canonical ones."""
        return canonical.from_canonical(self.config, name, get)


def compute_device(device: torch.device) -> torch.device:
    """Where a module built on `device` will run: one on meta goes to the accelerator, if there is any."""
    if device.type != "meta":
        return device
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
