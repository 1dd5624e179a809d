"""Dropout whose masks depend on no layout (arXiv:1207.0580): every element's fate is a hash of where it stands.

An element is dropped or kept by the run's seed, its sample's number in the run, its layer, its site there, its
position in the sample's row and its channel, or its head and key. No rank draws numbers from a generator, so
micro-batches, every kind of parallelism, recomputation and resumption give the same masks, and nothing is saved for
them.

Hashes are 32 bits, in int32 whose products wrap around. What an element stands for in all dims but the last, its row,
is hashed once, and so is its column; an element takes two more products (the constants are those of the hash-prospector
project's best two-round hash). Two rows agree by chance once in 2³² pairs.

Shape suffixes: B batch, T tokens or queries, S keys, D model size, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mt_core.distributed.mesh import Axis
from mt_core.parallel.tensor.collectives import local_shard

FIRST, SECOND, OFFSET = 0x21F0AAAD, 0x735A2D97, 0x1B873593


class DropoutKeys(NamedTuple):
    """What all masks of one layer depend on; both are int32."""

    samples_B: Tensor
    """A hash for each sample, of seed, sample and layer."""
    positions_T: Tensor
    """Index of each of this context rank's tokens in its sample's row; no position ids, which may restart."""

    def split_layers(self, first: int, count: int) -> list["DropoutKeys"]:
        """Keys of `count` layers, the number of the first being `first`, from those of the model."""
        numbers_L1 = torch.arange(first, first + count, dtype=torch.int32, device=self.samples_B.device)[:, None]
        return [DropoutKeys(layer_B, self.positions_T) for layer_B in fold(self.samples_B, numbers_L1).unbind()]


class ProbabilityDropout(NamedTuple):
    """Dropout of attention's probabilities: its rate, and which heads, queries and keys a core is called with.

    All tensors are int32. Context parallelism replaces the positions by those that its core sees.
    """

    rate: float
    samples_B: Tensor
    heads_H: Tensor
    """Numbers of the heads among those of all ranks."""
    queries_T: Tensor
    """Indices of the queries in their sample's row."""
    keys_S: Tensor
    """Indices of the keys in theirs."""


def number_positions(start: int, end: int, device: torch.device) -> Tensor:
    """The positions start … end − 1 in a sample's row, int32."""
    return torch.arange(start, end, dtype=torch.int32, device=device)


def mix(x: Tensor) -> Tensor:
    """A permutation of int32 that looks like none: each bit of the result depends on all of x."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * FIRST
    x = (x ^ ((x >> 15) & 0x1FFFF)) * SECOND
    return x ^ ((x >> 15) & 0x1FFFF)


def fold(key: Tensor, word: Tensor | int) -> Tensor:
    """A key that depends on another and on a word, broadcast; of equal keys, different words give different ones."""
    word = word if isinstance(word, Tensor) else torch.full((), word, dtype=torch.int32, device=key.device)
    return mix(key ^ mix(word + OFFSET))


def hash_elements(rows: Tensor, columns: Tensor) -> Tensor:
    """Numbers int32 […, N], all equally likely, of the rows' hashes […] and columns int32 [N]."""
    x = (rows[..., None] ^ mix(columns + OFFSET)) * FIRST
    return (x ^ ((x >> 15) & 0x1FFFF)) * SECOND


def make_mask(rows: Tensor, columns: Tensor, rate: float) -> Tensor:
    """Booleans, True for what is kept, with probability 1 − rate: of the rows' hashes […] and columns int32 [N],
    […, N]."""
    return hash_elements(rows, columns) >= round(rate * 2**32) - 2**31


def drop(x: Tensor, kept: Tensor, rate: float) -> Tensor:
    """What is kept, divided by 1 − rate, so that the mean stays as it is; 0 for the rest."""
    return x.masked_fill(~kept, 0) * (1 / (1 - rate))


def drop_features(x_BTD: Tensor, keys: DropoutKeys, rate: float, site: int) -> Tensor:
    """Drop features of tokens; `site` tells apart the operations of a layer that do so."""
    rows_BT = fold(fold(keys.samples_B, site)[:, None], keys.positions_T)
    return drop(x_BTD, make_mask(rows_BT, number_positions(0, x_BTD.shape[-1], x_BTD.device), rate), rate)


def jitter_features(x_BTD: Tensor, keys: DropoutKeys, rate: float, site: int) -> Tensor:
    """Multiply each feature of tokens by a number of its own in 1 − rate … 1 + rate, all equally likely."""
    rows_BT = fold(fold(keys.samples_B, site)[:, None], keys.positions_T)
    numbers_BTD = hash_elements(rows_BT, number_positions(0, x_BTD.shape[-1], x_BTD.device))
    return x_BTD * (1 + rate * (numbers_BTD.to(x_BTD.dtype) / 2**31))


FeatureOp = Callable[[Tensor, DropoutKeys, float, int], Tensor]
"""`drop_features` or `jitter_features`."""


@dataclass(frozen=True, slots=True)
class SequenceDropout:
    """A change of features where tensor ranks may hold a part of the sequence each, as between the matrices."""

    axis: Axis
    sequence: bool
    change: FeatureOp = drop_features

    def __call__(self, x_BTD: Tensor, keys: DropoutKeys, rate: float, site: int) -> Tensor:
        """[B, T of this rank, D] to the same shape, with the keys of the whole sequence."""
        positions_T = local_shard(keys.positions_T, self.axis, 0) if self.sequence else keys.positions_T
        return self.change(x_BTD, keys._replace(positions_T=positions_T), rate, site)


def number_heads(count: int, device: torch.device) -> Tensor:
    """The numbers of so many heads, all that there are, int32."""
    return number_positions(0, count, device)


@dataclass(frozen=True, slots=True)
class LocalHeads:
    """`number_heads` where heads are cut over an axis, an equal run of them for each rank."""

    axis: Axis

    def __call__(self, count: int, device: torch.device) -> Tensor:
        """The numbers, among all, of this rank's `count` heads."""
        return number_heads(count, device) + self.axis.rank * count


def pass_dropout(dropout: ProbabilityDropout | None, **changes: Tensor) -> dict[str, ProbabilityDropout]:
    """The keyword `dropout` of an attention core, some fields replaced; none where nothing is dropped, since a core
    need not know it."""
    if dropout is None:
        return {}
    # Dynamo cannot carry what `_replace` makes across a graph break, as before a core that exchanges
    return {"dropout": dropout._replace(**changes) if changes else dropout}


NumberHeads = Callable[[int, torch.device], Tensor]


def mask_probabilities(dropout: ProbabilityDropout) -> Tensor:
    """The mask of attention's probabilities, boolean [B, H, T, S]."""
    heads_BH1 = fold(dropout.samples_B[:, None], dropout.heads_H)[..., None]
    return make_mask(fold(heads_BH1, dropout.queries_T), dropout.keys_S, dropout.rate)


def drop_probabilities(weights_BGRTS: Tensor, dropout: ProbabilityDropout) -> Tensor:
    """Drop probabilities of G·R heads."""
    kept_BHTS = mask_probabilities(dropout)
    return drop(weights_BGRTS, kept_BHTS.unflatten(1, weights_BGRTS.shape[1:3]), dropout.rate)
