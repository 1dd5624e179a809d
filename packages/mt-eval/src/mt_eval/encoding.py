"""Texts as a model reads them: what its tokenizer puts before every text, and where a continuation begins.

A continuation is never encoded alone, as many tokenizers spell a word at the beginning of a text otherwise than inside:
its tokens are what the encoded whole has beyond the encoded context.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from mt_core.contracts import Tokenizer
from mt_core.errors import MtError


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """A tokenizer, and the tokens that go before every text."""

    tokenizer: Tokenizer
    prefix: tuple[int, ...] = ()
    """Ids before every text, a beginning of sequence or none; they are never predicted."""
    num_encoded: int = 0
    """Ids that the tokenizer's `encode` itself puts before a text: 1 in Llama2Tokenizer, else 0."""

    @classmethod
    def create(cls, tokenizer: Tokenizer, *, bos: bool | None = None) -> Self:
        """The encoder that does as the tokenizer says, or puts a beginning of sequence, or none.

        Where `bos` asks for one that the tokenizer does not have, the end of document is taken, which begins documents
        in training.
        """
        bos_id: int | None = getattr(tokenizer, "bos", None)
        num_encoded = int(tokenizer.encode("")[:1] == [bos_id])
        prefix: tuple[int, ...] = getattr(tokenizer, "prefix_ids", ())
        if bos_id is not None and num_encoded and not prefix:
            prefix = (bos_id,)
        if bos is False:
            prefix = ()
        elif bos and not prefix:
            token = getattr(tokenizer, "eod", None) if bos_id is None else bos_id
            if token is None:
                actual = f"{type(tokenizer).__name__} has neither a beginning nor an end of sequence"
                raise MtError("--bos", actual, "leave it out, or name bos_token in tokenizer_config.json")
            prefix = (token,)
        return cls(tokenizer, prefix, num_encoded)

    def encode(self, text: str) -> list[int]:
        """The prefix, then the ids of a text; the end of document where both are empty."""
        return [*self.prefix, *self.encode_plain(text)] or [self.tokenizer.eod]

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text alone."""
        return self.tokenizer.encode(text)[self.num_encoded :]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_plain` of each text, faster."""
        return [ids[self.num_encoded :] for ids in self.tokenizer.encode_batch(texts)]

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a context, prefix included, and of what follows it.

        The second are those of the whole beyond as many as the context has, so that both are the whole's where its
        encoding begins with the context's. Where it does not, since a token reaches over the seam, the context keeps
        its own ids and the cut is at their number, as lm-evaluation-harness does it. White space at the end of the
        context belongs to the continuation. Without a context it is an end of document that is continued.
        """
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        if not stripped:
            return self.encode(""), self.encode_plain(continuation)
        before = self.encode_plain(stripped)
        return [*self.prefix, *before], self.encode_plain(stripped + continuation)[len(before) :]

    def describe_prefix(self) -> str:
        """The prefix for people, text and id of each token: `<s> (1)`, or `none`."""
        spell = getattr(self.tokenizer, "token_text", lambda number: self.tokenizer.decode([number]))
        return " ".join(f"{spell(number)} ({number})" for number in self.prefix) or "none"
