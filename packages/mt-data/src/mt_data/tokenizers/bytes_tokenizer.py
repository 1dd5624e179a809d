"""`bytes`: every byte is a token, and 256 ends a document. It needs no files and no vocabulary."""

from collections.abc import Sequence
from pathlib import Path

from mt_data.config import TokenizerConfig
from mt_data.tokenizers.saved import write_saved
from mt_data.tokenizers.base import MaskingTokenizer

EOD_TEXT = "<|endoftext|>"


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
