"""Detokenizers: rules that make running text of files whose words and marks stand apart.

Which one a file needs is asked for by name and never guessed from where the file lies.

Source: docs/specs/evaluation.md §3.2.
"""

import re
from collections.abc import Callable, Mapping

from mt_core.errors import MtError
from mt_core.plugins import did_you_mean

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
"""Rules that undo the word tokenization of the WikiText releases, in the order that they are applied.

The order matters: later rules see what earlier ones left.
"""

PTB: tuple[Rule, ...] = (
    ("apostrophes", _joined((" '", "'"))),
    ("negations", _joined((" n't", "n't"))),
    ("numerals", _joined((" N ", "1 "))),
    ("dollars", _joined(("$ 1", "$1"))),
    ("number signs", _joined(("# 1", "#1"))),
)
"""Rules for the Penn Treebank, as Megatron has them: a numeral loses the space before it too."""

DETOKENIZERS: Mapping[str, tuple[Rule, ...]] = {"wikitext": WIKITEXT, "ptb": PTB, "none": ()}
"""By the name that an option gives."""


def detokenize(text: str, name: str = "wikitext") -> str:
    """Running text of a word-tokenised file; `MtError` for a name that no detokenizer has."""
    if name not in DETOKENIZERS:
        raise MtError("--detokenizer", f"unknown detokenizer {name!r}", did_you_mean(name, list(DETOKENIZERS)))
    for _, rule in DETOKENIZERS[name]:
        text = rule(text)
    return text
