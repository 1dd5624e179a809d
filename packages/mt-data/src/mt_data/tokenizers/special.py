"""Special tokens by their role, asked for in the same way of every tokenizer: `tokenizer.cls`, `tokenizer.pad`, …

For a role that a tokenizer lacks Megatron answers −1, None or an exception, depending on the class. Here it is always
`NoSuchToken`: an id of −1 never gets into data. It is an AttributeError too, so `getattr(tokenizer, "pad", -1)` works,
also for tokenizers of other packages that have no roles at all.
"""

from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Protocol

from mt_core.contracts import Tokenizer
from mt_core.errors import MtError


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

    @property
    def cls(self) -> int:
        """Id that begins a BERT sample."""
        return special_id(self, "cls")

    @property
    def sep(self) -> int:
        """Id that ends each part of a BERT sample."""
        return special_id(self, "sep")

    @property
    def pad(self) -> int:
        """Id that fills a sample up."""
        return special_id(self, "pad")

    @property
    def mask(self) -> int:
        """Id that stands for a hidden token."""
        return special_id(self, "mask")

    @property
    def bos(self) -> int:
        """Id that begins a sequence."""
        return special_id(self, "bos")

    @property
    def eos(self) -> int:
        """Id that ends a sequence."""
        return special_id(self, "eos")

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


def special_id(tokenizer: MaskingTokenizer, role: str) -> int:
    """Id of a role, or `NoSuchToken`."""
    if role not in tokenizer.special:
        has = ", ".join(tokenizer.special) or "no special tokens but the end of document"
        raise NoSuchToken(tokenizer.type, f"has no {role} token", f"choose another tokenizer: this one has {has}")
    return tokenizer.special[role]
