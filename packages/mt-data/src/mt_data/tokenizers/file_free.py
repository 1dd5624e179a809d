"""The two tokenizers that need no files: `bytes`, and `NullTokenizer` for texts of written token ids, `17 4 256`.

`NullTokenizer` is for data that was tokenized elsewhere, and for tests. With V given as `vocab_size` it has V + 1 ids,
the last ends a document, as in Megatron v0.11; today's main branch takes V for all ids and V − 1 for the end. Give it
one less to get that.
"""

from collections.abc import Sequence
from pathlib import Path

from mt_core.errors import MtError
from mt_data.config import TokenizerConfig
from mt_data.tokenizers.base import MaskingTokenizer
from mt_data.tokenizers.saved import write_saved

EOD_TEXT = "<|endoftext|>"


class NullTokenizer(MaskingTokenizer):
    """Whole numbers with white space between them."""

    def __init__(self, config: TokenizerConfig) -> None:
        self.type = config.type
        if config.vocab_size is None:
            raise MtError(self.type, "needs vocab_size", "give --vocab-size, without the end of document")
        self.eod = config.vocab_size
        self.vocab_size = config.vocab_size + 1

    def encode(self, text: str) -> list[int]:
        """The numbers in a text."""
        return [self._id(word) for word in text.split()]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The numbers, with a space between them."""
        return " ".join(map(str, ids))

    def vocabulary(self) -> dict[str, int]:
        """A token is its number."""
        return {str(number): number for number in range(self.vocab_size)}

    def save(self, directory: Path) -> None:
        """Write `mt_tokenizer.json`, all that there is to know."""
        write_saved(self, self.type, directory, options={"vocab_size": self.eod})

    def _id(self, word: str) -> int:
        if not (word.isascii() and word.isdigit()) or int(word) > self.eod:
            raise MtError(self.type, f"{word[:60]!r} is not a token id", f"whole numbers from 0 to {self.eod}")
        return int(word)


class BytesTokenizer(MaskingTokenizer):
    """UTF-8 bytes as ids 0 to 255. The text `<|endoftext|>` is thirteen bytes, never the end of a document."""

    type = "bytes"
    vocab_size = 257
    eod = 256

    def __init__(self, config: TokenizerConfig) -> None:
        del config  # every component of this kind takes one; this one needs nothing from it

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of a text."""
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of bytes; the end of a document shows as `<|endoftext|>`, bytes that are not UTF-8 as U+FFFD."""
        end = EOD_TEXT.encode()
        return b"".join(end if i == self.eod else bytes([i]) for i in ids).decode(errors="replace")

    def vocabulary(self) -> dict[str, int]:
        """Token to id; a byte is named by its number."""
        return {f"<0x{i:02X}>": i for i in range(256)} | {EOD_TEXT: self.eod}

    def save(self, directory: Path) -> None:
        """Write `mt_tokenizer.json`, all that there is to know."""
        write_saved(self, "bytes", directory)
