"""`SFTDataset`: sample i is line i of a JSON Lines file of conversations, around and around (docs/specs/data.md §5.7).
Where lines are packed, it is as many lines as fit.

The conversations of a sample are packed one after the other into L tokens. What is learnt is known token by token from
the prompt's format; no id decides it, as padding and the end of a turn are one and the same in many models.
"""

import functools
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mt_core.contracts import Dataset, Tokenizer
from mt_core.errors import MtError
from mt_data.blending.build import DatasetReader, SplitPart, Splits, SplitSizes, blend_splits
from mt_data.config import SFTData
from mt_data.datasets.packing import make_position_ids, make_segment_ids
from mt_data.datasets.sft.line_packing import find_samples
from mt_data.datasets.sft.prompt import (
    ConversationRenderer,
    EncodedConversation,
    Message,
    encode_conversation,
    get_offset_encoder,
    get_prompt_format,
    split_conversations,
)
from mt_data.datasets.sft.template import read_chat_template
from mt_data.indexed.cache import IndexCache
from mt_data.text_io.json_documents import BadLine, find_surrogate, parse_object
from mt_data.tokenizers.saved import fingerprint

NEWLINE, SCAN_BYTES = ord("\n"), 1 << 24
LINE_FORM = 'an object with "messages": [{"role": …, "content": …}, …]'
IGNORED = -100
"""Label of a token that is not learnt."""
CHECKED_LINES = 512
"""Lines of a split that are looked at before the run, evenly spaced."""


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
            messages = parse_object(text).get("messages")
        except BadLine as err:
            raise MtError(self.describe(number), str(err), LINE_FORM) from None
        if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
            raise MtError(self.describe(number), "holds no list of messages", LINE_FORM)
        if place := find_surrogate(messages):
            raise MtError(self.describe(number), f"holds half a surrogate pair in {place[:60]!r}", "whole characters")
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
    renderer: ConversationRenderer
    seq_length: int
    pad: int
    multiple: int


@dataclass(frozen=True, slots=True)
class SFTDataset:
    """Samples from the lines of a split in order; they are repeated if more samples are wanted."""

    lines: ConversationFile
    elements: range
    samples: int
    chat: ChatEncoding
    begin: int = 0
    """Samples that were given before the first of these."""
    starts: np.ndarray | None = None
    """The first element of each sample that lines share, and the number of elements; None if each line has its own."""

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray | np.generic]:
        """What `mt_data.datasets.sft.dataset.pack_conversations` makes of the conversations of the sample's lines."""
        if not 0 <= index < self.samples:
            raise IndexError(index)
        if self.starts is None:
            return self.pack(self.elements[(self.begin + index) % len(self.elements)])
        sample = (self.begin + index) % (len(self.starts) - 1)
        return self.pack(*self.elements[self.starts[sample] : self.starts[sample + 1]])

    def pack(self, *numbers: int) -> Mapping[str, np.ndarray | np.generic]:
        """The sample of lines of the file."""
        chat = self.chat
        encoded = (conversation for number in numbers for conversation in encode_line(self.lines, number, chat))
        return pack_conversations(encoded, seq_length=chat.seq_length, pad=chat.pad, multiple=chat.multiple)


def encode_line(lines: ConversationFile, number: int, chat: ChatEncoding) -> Iterator[EncodedConversation]:
    """The tokens of a line's conversations."""
    where, encode_with_offsets = lines.describe(number), get_offset_encoder(chat.tokenizer)
    for conversation in split_conversations(lines.read_messages(number), where):
        yield encode_conversation(chat.renderer.render(conversation, where), encode_with_offsets)


def count_line(lines: ConversationFile, number: int, chat: ChatEncoding) -> int:
    """How many tokens a line takes of a sample, each conversation filled up to the multiple."""
    sizes = (len(conversation.tokens) for conversation in encode_line(lines, number, chat))
    return sum(size + -size % chat.multiple for size in sizes)


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
    chat_encoding, cache = functools.cache(lambda: _make_chat_encoding(config)), IndexCache(cache_dir, builder)

    def build_dataset(lines: ConversationFile, part: SplitPart) -> Dataset:
        chat, starts = chat_encoding(), None
        if config.pack_lines:
            starts = find_samples(
                part.elements,
                lambda number: count_line(lines, number, chat),
                capacity=chat.seq_length,
                key=_describe_encoding(lines, chat, config),
                cache=cache,
            )
        epoch = len(part.elements) if starts is None else len(starts) - 1
        count = epoch if part.samples is None else part.samples
        dataset = SFTDataset(lines, part.elements, count, chat, part.extension.begin, starts)
        if builder:
            check_targets(dataset, max_untrained=config.max_untrained)
        return dataset

    return blend_splits(
        config,
        DatasetReader(ConversationFile, len, build_dataset, "lines"),
        samples=samples,
        cache=cache,
    )


def _describe_encoding(lines: ConversationFile, chat: ChatEncoding, config: SFTData) -> str:
    """What the tokens of lines depend on: the file as it is now, the tokenizer and the form of conversations."""
    status = Path(lines.path).stat()
    tokenizer = config.tokenizer.model_dump_json() if config.tokenizer is not None else ""
    file = (str(Path(lines.path).resolve()), status.st_size, status.st_mtime_ns)
    return repr((file, tokenizer, fingerprint(chat.tokenizer), chat.renderer, chat.multiple))


def _make_chat_encoding(config: SFTData) -> ChatEncoding:
    from mt_data.tokenizers import build_tokenizer

    assert config.tokenizer is not None, "data_problems asks for one"
    tokenizer = build_tokenizer(config.tokenizer)
    get_offset_encoder(tokenizer)  # a mistake shows before any work
    pad = getattr(tokenizer, "pad", getattr(tokenizer, "eod", 0))
    renderer = (
        read_chat_template(config)
        if config.prompt_format == "template"
        else get_prompt_format(config.prompt_format, tokenizer)
    )
    return ChatEncoding(tokenizer, renderer, config.seq_length, pad, config.conversation_multiple)


def check_targets(dataset: SFTDataset, *, max_untrained: float) -> None:
    """Warn of lines whose samples have nothing to learn; above a share of `max_untrained` they are an `MtError`.

    Of a long split `CHECKED_LINES` lines are looked at, evenly spaced.
    """
    numbers = dataset.elements[:: -(-len(dataset.elements) // CHECKED_LINES)]
    untrained = [number for number in numbers if not np.any(dataset.pack(number)["loss_mask"])]
    if not untrained:
        return
    actual = f"{len(untrained):,} of {len(numbers):,} lines have no token to learn, conversation line "
    actual += f"{untrained[0] + 1} the first: no answer, or none within data.seq_length = {dataset.chat.seq_length}"
    hint = "a longer data.seq_length, or shorter prompts"
    if len(untrained) > max_untrained * len(numbers):
        hint = f"{hint}; data.max_untrained = {max_untrained:g} is the share that is let pass"
        raise MtError(dataset.lines.path, actual, hint)
    print(f"warning: {dataset.lines.path}: {actual}; {hint}", file=sys.stderr)


def pack_conversations(
    conversations: Iterable[EncodedConversation], *, seq_length: int, pad: int, multiple: int = 1
) -> Mapping[str, np.ndarray | np.generic]:
    """A sample: conversations until it is full, the last cut off, or else filled up.

    Each is filled up to a `multiple` of tokens. Returns int64 [L] `tokens`, `labels`, `position_ids`, `segment_ids` and
    `padding_mask`, 0 where a token fills up, and `loss_mask` float32 [L]. Where that is 0 the label is `pad` behind a
    conversation, else −100. A segment is a conversation.
    """
    tokens, learnt, is_filler, ends = [], [], [], [0]
    for conversation in conversations:
        size = len(conversation.tokens)
        filler = -size % multiple
        tokens += [*conversation.tokens, *[pad] * filler]
        learnt += [*conversation.learnt, *[False] * filler]
        is_filler += [*[False] * size, *[True] * filler]
        ends.append(len(tokens))
        if len(tokens) > seq_length:
            break
    text, is_learnt, is_pad = (
        np.full(seq_length + 1, pad, np.int64),
        np.zeros(seq_length + 1, bool),
        np.ones(seq_length + 1, bool),
    )
    kept = min(len(tokens), seq_length)
    text[:kept], is_learnt[:kept], is_pad[:kept] = tokens[:kept], learnt[:kept], is_filler[:kept]
    lengths = np.diff([*ends[:-1], seq_length])
    return {
        "tokens": text[:-1],
        "labels": np.where(is_learnt | is_pad, text, IGNORED)[1:],
        "loss_mask": is_learnt[1:].astype(np.float32),
        "position_ids": make_position_ids(lengths),
        "segment_ids": make_segment_ids(lengths, seq_length),
        "padding_mask": (~is_pad[:-1]).astype(np.int64),
    }
