"""The KV cache in pages: keys and values of tokens that a model has seen, in blocks that sequences take and give back.

A sequence has a table of blocks; the token at position p is in the block of number p // block size in its table. Whose
a block is, is not known here. Of latent attention a block has the latents, which are values too, and the features that
keys of all heads share. One pass takes tokens of many sequences, each a row of its own, [N, 1]: first those of
sequences that have one token each, then those of sequences that have several. No gradient flows through the cache.

Shape suffixes: N tokens of a pass, B sequences, T tokens of each, S keys, H query heads, G key/value groups, K and V
features of a key and a value.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from mt_models.config import GPTConfig
from mt_models.layers.attention_cores import PLAIN, ScoreMods, attend_sdpa
from mt_models.layers.paged_attention import KEY_TILE, attend_cached
from mt_models.layers.rope import Rotation, rotate


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one sequence, and its table: blocks by their number in the sequence."""

    start: int
    """Position of the first token."""
    tokens: int
    """How many there are; the table has the blocks of all."""
    table: Sequence[int]
    """Blocks of the cache; those that are wholly outside of every layer's window may be any."""


@dataclass(frozen=True, slots=True)
class KeyIndex:
    """Where the keys of sequences are that have equally many tokens in a pass, and which of them a token sees."""

    blocks: Tensor
    """Blocks of the cache, as many for each sequence: for the first group those of one sequence after the other, then
    for the second. The blocks of a group are numbered behind those of the group before."""
    hidden_BTS: Tensor
    """True for keys of the future, those outside the window, and what is behind the sequence."""


class SpanGroup:
    """Spans of equally many tokens: the rows of a pass from `first` on."""

    def __init__(self, spans: Sequence[Span], first: int, cache: "KVCache") -> None:
        self.spans, self.block_size, self.device = spans, cache.block_size, cache.k.device
        self.firsts_G1 = torch.arange(cache.k.shape[1], device=self.device)[:, None] * cache.blocks
        self.tokens = spans[0].tokens
        self.rows = slice(first, first + len(spans) * self.tokens)
        self._indices: dict[int | None, KeyIndex] = {}

    def index_keys(self, window: int | None) -> KeyIndex:
        """The keys that layers of a window need: whole tiles, from the one of the first key that is seen on."""
        if window not in self._indices:
            self._indices[window] = self._index_keys(window)
        return self._indices[window]

    def _index_keys(self, window: int | None) -> KeyIndex:
        starts = [
            0 if window is None else max(span.start - window + 1, 0) // KEY_TILE * KEY_TILE for span in self.spans
        ]
        ends = [span.start + span.tokens for span in self.spans]
        step = max(self.block_size, KEY_TILE)
        keys = max(-(-(end - start) // step) * step for start, end in zip(starts, ends, strict=True))
        count = keys // self.block_size
        tables = []
        for span, start in zip(self.spans, starts, strict=True):
            table = list(span.table[start // self.block_size :][:count])
            tables += [*table, *[0] * (count - len(table))]
        starts_B = torch.tensor(starts, device=self.device)
        first_B = torch.tensor([span.start for span in self.spans], device=self.device)
        keys_BS = starts_B[:, None] + torch.arange(keys, device=self.device)
        queries_BT = first_B[:, None] + torch.arange(self.tokens, device=self.device)
        behind_BTS = queries_BT[:, :, None] - keys_BS[:, None]
        hidden_BTS = behind_BTS < 0
        if window is not None:
            hidden_BTS |= behind_BTS >= window
        return KeyIndex((self.firsts_G1 + torch.tensor(tables, device=self.device)).flatten(), hidden_BTS)


class KVCache:
    """Blocks for every layer of a model; their content is undefined until `clear` or a pass."""

    def __init__(
        self,
        config: GPTConfig,
        blocks: int,
        block_size: int,
        *,
        groups: int | None = None,
        layers: range | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """`groups` are those of this rank's share of the heads, and `layers` the numbers of its layers, if not all."""
        assert KEY_TILE % block_size == 0, "a tile of keys is whole blocks"
        G, K, V = config.attention.cache_sizes
        self.block_size, self.blocks = block_size, blocks
        layers = range(config.layers) if layers is None else layers
        self.windows = [config.attention.get_window(layer) for layer in layers]
        shape = (len(layers), G if groups is None else groups, blocks, block_size)
        self.k = torch.zeros(*shape, K, dtype=dtype, device=device)
        self.v = torch.zeros(*shape, V, dtype=dtype, device=device) if V else None
        self.exact = self.k.device.type == "cpu"
        """Whether a token's result may depend on nothing but the tokens before it, to the last bit."""

    def _tensors(self) -> list[Tensor]:
        return [self.k] if self.v is None else [self.k, self.v]

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def clear(self, blocks: Sequence[int]) -> None:
        """Fill blocks with zeros, so that nothing left in them, such as NaN, reaches their next owner."""
        indices = torch.tensor(blocks, device=self.k.device)
        for tensor in self._tensors():
            tensor.index_fill_(2, indices, 0)

    def forget(self, table: Sequence[int], start: int, end: int) -> None:
        """Fill the places of a sequence's positions from `start` to before `end` with zeros."""
        size = self.block_size
        slots = torch.tensor([table[p // size] * size + p % size for p in range(start, end)], device=self.k.device)
        for tensor in self._tensors():
            tensor.flatten(2, 3).index_fill_(2, slots, 0)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy blocks to others."""
        for tensor in self._tensors():
            tensor[:, :, list(targets)] = tensor[:, :, list(sources)]

    def place(self, spans: Iterable[Span]) -> "CachePass":
        """What a model needs for one pass over the tokens of these spans, in their order."""
        return CachePass(self, list(spans))


class CachePass:
    """The cache as one forward pass uses it."""

    def __init__(self, cache: KVCache, spans: Sequence[Span]) -> None:
        self.cache, device, size = cache, cache.k.device, cache.block_size
        numbers = [(span, p) for span in spans for p in range(span.start, span.start + span.tokens)]
        self.positions_N1 = torch.tensor([[position] for _, position in numbers], device=device)
        slots = [span.table[position // size] * size + position % size for span, position in numbers]
        self.slots_N = torch.tensor(slots, device=device)
        self.length = 1 + max(position for _, position in numbers)
        """Positions that the longest sequence has after the pass."""
        self.groups: list[SpanGroup] = []
        first = 0
        for _, equal in groupby(spans, lambda span: (span.tokens, span.start == 0)):
            same = list(equal)
            # where results are to be exact, a prompt's products have one shape, whatever other prompts there are
            for part in [[span] for span in same] if cache.exact and same[0].tokens > 1 else [same]:
                self.groups.append(SpanGroup(part, first, cache))
                first = self.groups[-1].rows.stop

    @cached_property
    def layers(self) -> list["LayerCache"]:
        """The part of each layer."""
        return [LayerCache(self, layer) for layer in range(len(self.cache.windows))]


class LayerCache:
    """One layer's blocks in one pass."""

    def __init__(self, cache_pass: CachePass, layer: int) -> None:
        cache = cache_pass.cache
        self.step, self.window, self.exact = cache_pass, cache.windows[layer], cache.exact
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
        """Store the tokens' keys and values, and attend to those of their sequences up to them, [N, 1, H, V].

        Queries and keys are rotated first, if there is a rotation. Without values, they are the first `values` features
        of the keys. The window is that of the layer.
        """
        if rotation is not None:
            q_N1HK, k_N1GK = rotate(q_N1HK, rotation), rotate(k_N1GK, rotation)
        for stored, new in ((self.k, k_N1GK), (self.v, v_N1GV)):
            if stored is None or new is None:
                continue
            stored.flatten(1, 2).index_copy_(1, self.step.slots_N, new[:, 0].transpose(0, 1).to(stored.dtype))
        parts = []
        for group in self.step.groups:
            sequences = len(group.spans)
            q_BTHK = q_N1HK[group.rows, 0].unflatten(0, (sequences, group.tokens))
            if v_N1GV is not None and self._sees_only_new(group, scores):
                new = (x[group.rows, 0].unflatten(0, (sequences, group.tokens)) for x in (k_N1GK, v_N1GV))
                parts.append(attend_sdpa(q_BTHK, *new, scores=ScoreMods(scores.scale)).flatten(0, 1))
                continue
            index = group.index_keys(self.window)
            k_GBSK, v_GBSV = (
                None if t is None else gather_blocks(t, index.blocks, sequences) for t in (self.k, self.v)
            )
            assert k_GBSK is not None
            v_GBSV = k_GBSK[..., :values] if v_GBSV is None else v_GBSV
            y_BTHV = attend_cached(q_BTHK, k_GBSK, v_GBSV, index.hidden_BTS, scores, exact=self.exact)
            parts.append(y_BTHV.flatten(0, 1))
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[:, None]

    def _sees_only_new(self, group: SpanGroup, scores: ScoreMods) -> bool:
        """Whether a fused core can attend, as whole sequences are in the pass and nothing is to be exact."""
        windowed = self.window is not None and self.window < group.tokens
        return not (self.exact or windowed or scores.softcap) and all(span.start == 0 for span in group.spans)


def gather_blocks(stored: Tensor, blocks: Tensor, sequences: int) -> Tensor:
    """Copy blocks of a layer, [G, blocks, block size, K], to where they lie in order: [G, B, S, K]."""
    rows = stored.flatten(0, 1).flatten(1).index_select(0, blocks)  # along the first dim threads share the work
    return rows.view(len(stored), sequences, -1, stored.shape[-1])
