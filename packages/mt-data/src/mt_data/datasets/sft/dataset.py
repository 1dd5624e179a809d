"""`SFTDataset`: sample i is line i of a JSON Lines file of conversations, around and around (docs/specs/data.md §5.7).

The conversations of a line are packed one after the other into L tokens.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mt_core.contracts import Dataset, Tokenizer
from mt_core.errors import MtError
from mt_data.blending.build import DatasetReader, SplitPart, Splits, SplitSizes, blend_splits
from mt_data.config import SFTData
from mt_data.datasets.packing import make_position_ids, make_segment_ids
from mt_data.datasets.sft.prompt import (
    IGNORED,
    Message,
    PromptFormat,
    encode_conversation,
    get_prompt_format,
    split_conversations,
)
from mt_data.indexed.cache import IndexCache

NEWLINE, SCAN_BYTES = ord("\n"), 1 << 24
LINE_FORM = 'an object with "messages": [{"role": …, "content": …}, …]'
EncodedConversation = tuple[list[int], list[int]]
"""Tokens and targets of a conversation."""


@dataclass(frozen=True)
class ConversationFile:
    """The lines of a file, found once and read when asked for; a copy in another process finds them again."""

    path: str

    @cached_property
    def starts(self) -> np.ndarray:
        """Byte offsets of the lines that are not empty, and the end, int64 [lines + 1]."""
        size = Path(self.path).stat().st_size
        data = np.memmap(self.path, np.uint8, "r") if size else np.zeros(0, np.uint8)
        blocks = [
            np.flatnonzero(data[offset : offset + SCAN_BYTES] == NEWLINE) + offset
            for offset in range(0, size, SCAN_BYTES)
        ]
        bounds = np.concatenate(([0], *(block + 1 for block in blocks), [size])).astype(np.int64)
        written = np.diff(bounds) - 1
        written[-1] += 1  # what follows the last line's end has none
        return bounds[np.concatenate((written > 0, [True]))]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def read_messages(self, number: int) -> list[Message]:
        """The messages of a line."""
        start, stop = self.starts[number : number + 2].tolist()
        with Path(self.path).open("rb") as file:
            file.seek(start)
            text = file.read(stop - start)
        try:
            messages = json.loads(text)["messages"]
        except (ValueError, KeyError, TypeError) as err:
            raise MtError(self.describe(number), f"holds no messages ({err!r})", LINE_FORM) from err
        if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
            raise MtError(self.describe(number), "holds no list of messages", LINE_FORM)
        return messages

    def describe(self, number: int) -> str:
        """A line as messages name it; empty lines are not counted."""
        return f"{self.path}, conversation line {number + 1}"

    def __reduce__(self) -> tuple[Any, ...]:
        return ConversationFile, (self.path,)


@dataclass(frozen=True, slots=True)
class ChatEncoding:
    """How conversations become samples."""

    tokenizer: Tokenizer
    prompt: PromptFormat
    seq_length: int
    pad: int
    multiple: int


@dataclass(frozen=True, slots=True)
class SFTDataset:
    """Samples from the lines of a split in order; the lines are repeated if more samples are wanted."""

    lines: ConversationFile
    elements: range
    samples: int
    chat: ChatEncoding
    begin: int = 0
    """Samples that were given before the first of these."""

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray | np.generic]:
        """What `mt_data.datasets.sft.dataset.pack_conversations` makes of a line's conversations."""
        if not 0 <= index < self.samples:
            raise IndexError(index)
        number, chat = self.elements[(self.begin + index) % len(self.elements)], self.chat
        conversations = split_conversations(self.lines.read_messages(number), self.lines.describe(number))
        encoded = (encode_conversation(conversation, chat.tokenizer, chat.prompt) for conversation in conversations)
        return pack_conversations(encoded, seq_length=chat.seq_length, pad=chat.pad, multiple=chat.multiple)


def build_splits(
    config: SFTData,
    *,
    samples: SplitSizes,
    seed: int,
    cache_dir: Path,
    builder: bool = True,
) -> Splits:
    """The three datasets of a section; shares of the split are of lines, and nothing is random."""
    del seed
    chat_encoding = cache(lambda: _make_chat_encoding(config))

    def build_dataset(lines: ConversationFile, part: SplitPart) -> Dataset:
        count = len(part.elements) if part.samples is None else part.samples
        return SFTDataset(lines, part.elements, count, chat_encoding(), part.extension.begin)

    return blend_splits(
        config,
        DatasetReader(ConversationFile, len, build_dataset, "lines"),
        samples=samples,
        cache=IndexCache(cache_dir, builder),
    )


def _make_chat_encoding(config: SFTData) -> ChatEncoding:
    from mt_data.tokenizers import build_tokenizer

    assert config.tokenizer is not None, "data_problems asks for one"
    tokenizer = build_tokenizer(config.tokenizer)
    pad = getattr(tokenizer, "pad", tokenizer.eod)
    prompt = get_prompt_format(config.prompt_format, tokenizer)
    return ChatEncoding(tokenizer, prompt, config.seq_length, pad, config.conversation_multiple)


def pack_conversations(
    conversations: Iterable[EncodedConversation], *, seq_length: int, pad: int, multiple: int = 1
) -> Mapping[str, np.ndarray | np.generic]:
    """A sample: conversations until it is full, the last cut off, or else filled up.

    Each is filled up to a `multiple` of tokens. Returns int64 [L] `tokens`, `labels`, `position_ids` and `segment_ids`,
    the labels with padding and −100 where `loss_mask` float32 [L] is 0; a segment is a conversation.
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
        "position_ids": make_position_ids(lengths),
        "segment_ids": make_segment_ids(lengths, seq_length),
    }
