"""How BERT splits a text into words before WordPiece, in Python's own Unicode (docs/specs/data.md §3.3).

This is the definition; `word_piece` uses a faster library for every text on which the two agree.
"""

import unicodedata

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


def split_words(text: str, *, lower: bool) -> list[str]:
    """Words and punctuation marks of a text; with `lower` in lower case and without accents."""
    text = "".join(map(_clean, text))
    if lower:
        text = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    return "".join(f" {c} " if _is_punctuation(c) else c for c in text).split()


def acts_beyond_itself(character: str, *, lower: bool) -> bool:
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
    return f" {character} " if _within(character, CJK) else character


def _is_punctuation(character: str) -> bool:
    return _within(character, ASCII_PUNCTUATION) or unicodedata.category(character)[0] == "P"


def _within(character: str, ranges: tuple[tuple[int, int], ...]) -> bool:
    return any(first <= ord(character) <= last for first, last in ranges)
