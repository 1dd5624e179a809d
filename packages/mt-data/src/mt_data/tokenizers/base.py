"""What mt-data's tokenizers share: special tokens by role, and the `tokenizers` library.

Every tokenizer is asked for special tokens in the same way: `tokenizer.cls`, `tokenizer.pad`, … For a role that a
tokenizer lacks Megatron answers −1, None or an exception, depending on the class. Here it is always `NoSuchToken`: an
id of −1 never gets into data. It is an AttributeError too, so `getattr(tokenizer, "pad", -1)` works, also for
tokenizers of other packages that have no roles at all.
"""

import multiprocessing
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from mt_core.contracts import Tokenizer
from mt_core.errors import MtError

if TYPE_CHECKING:
    import tokenizers


class NoSuchToken(MtError, AttributeError):
    """A tokenizer was asked for a special token that it does not have."""


class MaskingTokenizer(Tokenizer, Protocol):
    """A tokenizer whose special tokens and vocabulary can be asked for, as BERT, T5 and ICT do.

    All of mt-data's subclass it: they set `type`, fill `special`, and inherit the rest.
    """

    type: str
    """Component of kind `tokenizer`."""
    special: Mapping[str, int] = MappingProxyType({})
    """Id of each role that the tokenizer has: cls, sep, pad, mask, bos, eos."""
    additional_special_tokens_ids: tuple[int, ...] = ()
    """Ids of the extra tokens, T5's sentinels, in their order."""
    prefix_ids: tuple[int, ...] = ()
    """Ids that the tokenizer's own files put before every text that a model reads: a beginning of sequence, or none."""

    @property
    def cls(self) -> int:
        """Id that begins a BERT sample."""
        return get_special_id(self, "cls")

    @property
    def sep(self) -> int:
        """Id that ends each part of a BERT sample."""
        return get_special_id(self, "sep")

    @property
    def pad(self) -> int:
        """Id that fills a sample up."""
        return get_special_id(self, "pad")

    @property
    def mask(self) -> int:
        """Id that replaces a masked token."""
        return get_special_id(self, "mask")

    @property
    def bos(self) -> int:
        """Id that begins a sequence."""
        return get_special_id(self, "bos")

    @property
    def eos(self) -> int:
        """Id that ends a sequence."""
        return get_special_id(self, "eos")

    def vocabulary(self) -> dict[str, int]:
        """Token to id; no two tokens have one id."""
        ...

    @cached_property
    def texts(self) -> dict[int, str]:
        """Id to token: the inverse of `vocabulary`."""
        return {number: token for token, number in self.vocabulary().items()}

    def token_text(self, number: int) -> str:
        """The token behind an id as the vocabulary spells it: `##ing`, `▁the`."""
        try:
            return self.texts[number]
        except KeyError:
            raise MtError(self.type, f"has no token {number}", f"ids below {self.vocab_size}") from None


def get_special_id(tokenizer: MaskingTokenizer, role: str) -> int:
    """Id of a role, or `NoSuchToken`."""
    if role not in tokenizer.special:
        has = ", ".join(tokenizer.special) or "no special tokens but the end of document"
        raise NoSuchToken(tokenizer.type, f"has no {role} token", f"choose another tokenizer: this one has {has}")
    return tokenizer.special[role]


class LibraryTokenizer(MaskingTokenizer):
    """Sets nothing but how texts are encoded and decoded; who subclasses it sets `_tokenizer`."""

    _tokenizer: "tokenizers.Tokenizer"

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; adds no special tokens of its own."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text, and for each the characters [begin, end) of the text that it stands for."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, faster."""
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included; bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def vocabulary(self) -> dict[str, int]:
        """Token to id as the library spells them, added tokens included."""
        return self._tokenizer.get_vocab(with_added_tokens=True)


def count_threads() -> int:
    """Threads for a batch: every core, but one in a worker process, where the processes are the parallelism."""
    if multiprocessing.parent_process() is not None:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
