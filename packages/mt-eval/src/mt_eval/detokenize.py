"""Undo the word tokenisation of the WikiText releases (docs/specs/evaluation.md §3.2).

The table is applied from top to bottom, and the order matters: later rules see what earlier ones left.
"""

import re
from collections.abc import Callable

Rule = tuple[str, Callable[[str], str]]


def _joined(*replacements: tuple[str, str]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        for old, new in replacements:
            text = text.replace(old, new)
        return text

    return apply


def _unpadded(*pairs: str) -> Callable[[str], str]:
    """Trim white space just inside each nearest pair of marks, without a pass per pair found."""
    patterns = [re.compile(f"({re.escape(a)})([^{re.escape(b)}]*)({re.escape(b)})") for a, b in pairs]

    def apply(text: str) -> str:
        for pattern in patterns:
            text = pattern.sub(lambda match: match[1] + match[2].strip() + match[3], text)
        return text

    return apply


def _slashed_apostrophe(text: str) -> str:
    """Join an apostrophe and a digit between two literal slashes; kept because the published figures had it."""
    return re.sub(r"/' ([0-9])/", r"/'\1/", text)


WIKITEXT: tuple[Rule, ...] = (
    ("plural possessives", _joined(("s '", "s'"))),
    ("slashed years", _slashed_apostrophe),
    ("marks inside words and numbers", _joined((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."))),
    ("space before punctuation", _joined(*((f" {mark} ", f"{mark} ") for mark in ":;.!?,"))),
    ("space inside brackets and quotes", _unpadded("()", "[]", "{}", '""', "''")),
    ("headings", _joined(*((" ".join("=" * n), "=" * n) for n in (4, 3, 2)))),
    ("degrees", _joined((" ° ", "°"))),
    ("space around line breaks", _joined((" \n", "\n"), ("\n ", "\n"))),
    ("numerals", _joined((" N ", " 1 "))),
    ("possessives", _joined((" 's", "'s"))),
)


def wikitext(text: str) -> str:
    """Running text of a word-tokenised WikiText file."""
    for _, rule in WIKITEXT:
        text = rule(text)
    return text
