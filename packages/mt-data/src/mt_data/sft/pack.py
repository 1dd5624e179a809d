"""Conversations one after the other in a sample of L tokens (docs/specs/data.md §5.7)."""

from collections.abc import Iterable, Mapping

import numpy as np

from mt_data.packed import document_bounds, positions
from mt_data.sft.prompt import IGNORED

Encoded = tuple[list[int], list[int]]
"""Tokens and targets of a conversation."""


def pack(
    conversations: Iterable[Encoded], *, seq_length: int, pad: int, multiple: int = 1
) -> Mapping[str, np.ndarray | np.generic]:
    """A sample: conversations until it is full, the last cut off, or else filled up.

    Each is filled up to a `multiple` of tokens. Returns `tokens`, `labels`, `position_ids` int64 [L], the labels with
    padding and −100 where `loss_mask` float32 [L] is 0, and the conversations' bounds as `document_bounds`.
    """
    tokens, targets, ends = [], [], [0]
    for some_tokens, some_targets in conversations:
        filler = [pad] * (-len(some_tokens) % multiple)
        tokens += [*some_tokens, *filler]
        targets += [*some_targets, *filler]
        ends.append(len(tokens))
        if len(tokens) > seq_length:
            break
    text, labels = np.full(seq_length + 1, pad, np.int64), np.full(seq_length + 1, pad, np.int64)
    kept = min(len(tokens), seq_length)
    text[:kept], labels[:kept] = tokens[:kept], targets[:kept]
    lengths = np.diff([*ends[:-1], seq_length])
    learnt = (labels[1:] != pad) & (labels[1:] != IGNORED)
    return {
        "tokens": text[:-1],
        "labels": labels[1:],
        "loss_mask": learnt.astype(np.float32),
        "position_ids": positions(lengths),
        **document_bounds(lengths, seq_length),
    }
