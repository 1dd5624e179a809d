"""`BertWordPieceLowerCase` and `BertWordPieceCase`: BERT's WordPiece from a vocab.txt, on the `tokenizers` library.

The ids are those of Megatron v0.11 (docs/specs/data.md §3.3), without `[CLS]` and `[SEP]` around a text: datasets place
them. Today's main branch does add them, which puts them into the middle of BERT's samples. `[CLS]` in a text is
three words.

`split_words` defines how a text is split, in Python's own Unicode. The library knows an older Unicode, takes private
characters for control characters, and lower-cases Σ without looking at the end of the word. So a text is given to it
only if the two agree on each of its characters: each new one is tried once. Other texts are split by `split_words` and
only then matched by the library.
"""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from mt_core.errors import MtError
from mt_data.config import TokenizerConfig
from mt_data.tokenizers.base import MaskingTokenizer
from mt_data.tokenizers.saved import write_bytes, write_saved

LOWER_CASE = "BertWordPieceLowerCase"
UNKNOWN = "[UNK]"
VOCABULARY_TOKENS = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
ADDED_TOKENS = {"bos": "[BOS]", "eos": "[EOS]"}
LONGEST_WORD = 200
FILE = "vocab.txt"
CJK = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)
"""Ideographs, each of which is a word."""
ASCII_PUNCTUATION = ((33, 47), (58, 64), (91, 96), (123, 126))
SIGMA = "Σ"


class BertWordPiece(MaskingTokenizer):
    """BERT's tokenizer; `[EOS]` ends documents."""

    def __init__(self, config: TokenizerConfig) -> None:
        self.type = config.type
        if not config.vocab_file:
            raise MtError(self.type, "needs vocab_file", "give --vocab-file: a vocab.txt with a token a line")
        self._path = Path(config.vocab_file)
        self._content = read_file(self._path)
        self._vocabulary = parse_vocabulary(self._content, str(self._path))
        extra = [f"<extra_id_{i}>" for i in range(config.vocab_extra_ids)]
        for token in (*ADDED_TOKENS.values(), *extra):
            self._vocabulary.setdefault(token, len(self._vocabulary))
        self.special = {role: self._vocabulary[token] for role, token in (VOCABULARY_TOKENS | ADDED_TOKENS).items()}
        self.additional_special_tokens_ids = tuple(self._vocabulary[token] for token in extra)
        self.eod = self.special["eos"]
        self.vocab_size = len(self._vocabulary)
        self._lower = config.type == LOWER_CASE
        self._tokenizer = make_word_piece(self._vocabulary, lower=self._lower)
        self._known = {chr(code) for code in range(128)}  # on these the two agree
        self._odd: set[str] = set()  # on these they do not

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        if self._is_odd(text):
            model = self._tokenizer.model
            return [token.id for word in split_words(text, lower=self._lower) for token in model.tokenize(word)]  # pyright: ignore[reportAttributeAccessIssue]
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, faster."""
        odd = [self._is_odd(text) for text in texts]
        plain = ["" if is_odd else text for text, is_odd in zip(texts, odd, strict=True)]
        encoded = self._tokenizer.encode_batch_fast(plain, add_special_tokens=False)
        return [self.encode(text) if is_odd else e.ids for text, is_odd, e in zip(texts, odd, encoded, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        """Tokens with a space between, `##` pieces joined to what precedes them."""
        return self._tokenizer.decode([int(number) for number in ids], skip_special_tokens=False)

    def vocabulary(self) -> dict[str, int]:
        """Token to id, in the order of the ids."""
        return dict(self._vocabulary)

    def save(self, directory: Path) -> None:
        """Write vocab.txt as it was read, and the number of extra ids."""
        write_bytes(directory / FILE, self._content)
        extra = len(self.additional_special_tokens_ids)
        write_saved(self, self.type, directory, options={"vocab_file": FILE, "vocab_extra_ids": extra})

    def _is_odd(self, text: str) -> bool:
        if text.isascii():
            return False
        characters = set(text)
        for character in characters - self._known:
            self._known.add(character)
            if depends_on_neighbours(character, lower=self._lower) or self._differs(f"a{character}b"):
                self._odd.add(character)
        return not characters.isdisjoint(self._odd)

    def _differs(self, text: str) -> bool:
        normalized = self._tokenizer.normalizer.normalize_str(text)  # pyright: ignore[reportOptionalMemberAccess]
        split = self._tokenizer.pre_tokenizer.pre_tokenize_str(normalized)  # pyright: ignore[reportOptionalMemberAccess]
        return [word for word, _ in split] != split_words(text, lower=self._lower)


def make_word_piece(vocabulary: dict[str, int], *, lower: bool) -> Tokenizer:
    """The library's WordPiece with BERT's way of splitting, and no special tokens."""
    model = models.WordPiece(vocab=vocabulary, unk_token=UNKNOWN, max_input_chars_per_word=LONGEST_WORD)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=lower, lowercase=lower)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def read_file(path: Path) -> bytes:
    """The bytes of a vocab.txt."""
    if not path.is_file():
        raise MtError(str(path), "does not exist", "a vocab.txt: a token a line")
    return path.read_bytes()


def parse_vocabulary(content: bytes, where: str) -> dict[str, int]:
    """Token to id, which is the number of its line from 0; checks that BERT's own tokens are there."""
    try:
        text = content.decode()
    except UnicodeDecodeError as err:
        raise MtError(where, "is not UTF-8 text", "a vocab.txt: a token a line") from err
    lines = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")
    vocabulary: dict[str, int] = {}
    for number, line in enumerate(lines):
        if (first := vocabulary.setdefault(line.strip(), number)) != number:
            actual = f"{line.strip()!r} stands on line {first + 1} already"
            raise MtError(f"{where}:{number + 1}", actual, "each token once, as the line number is its id")
    if missing := [token for token in (*VOCABULARY_TOKENS.values(), UNKNOWN) if token not in vocabulary]:
        raise MtError(where, f"lacks {', '.join(missing)}", "a vocab.txt of BERT, with its special tokens")
    return vocabulary


def split_words(text: str, *, lower: bool) -> list[str]:
    """Words and punctuation marks of a text; with `lower` in lower case and without accents."""
    text = "".join(map(_clean, text))
    if lower:
        text = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    return "".join(f" {c} " if _is_punctuation(c) else c for c in text).split()


def depends_on_neighbours(character: str, *, lower: bool) -> bool:
    """Whether its neighbours decide what becomes of it: Σ at the end of a word, marks that are put in order."""
    if not lower:
        return False
    parts = unicodedata.normalize("NFD", character)
    return character == SIGMA or any(unicodedata.combining(c) and unicodedata.category(c) != "Mn" for c in parts)


def _clean(character: str) -> str:
    if character in "\t\n\r" or unicodedata.category(character) == "Zs":
        return " "
    if character in "\0\ufffd" or unicodedata.category(character) in ("Cc", "Cf"):
        return ""
    return f" {character} " if _in_ranges(character, CJK) else character


def _is_punctuation(character: str) -> bool:
    return _in_ranges(character, ASCII_PUNCTUATION) or unicodedata.category(character)[0] == "P"


def _in_ranges(character: str, ranges: tuple[tuple[int, int], ...]) -> bool:
    return any(first <= ord(character) <= last for first, last in ranges)
