"""Text to ids and back on a tokenizer of the `tokenizers` library, for those that take it as it is."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from mt_data.tokenizers.base import MaskingTokenizer


class LibraryTokenizer(MaskingTokenizer):
    """Sets nothing but how texts are encoded and decoded; who subclasses it sets `_tokenizer`."""

    _tokenizer: Tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; adds no special tokens of its own."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, faster."""
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included; bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def vocabulary(self) -> dict[str, int]:
        """Token to id as the library spells them, added tokens included."""
        return self._tokenizer.get_vocab(with_added_tokens=True)
