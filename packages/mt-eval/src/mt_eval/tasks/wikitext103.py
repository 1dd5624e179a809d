"""WikiText-103 perplexity per original word, as published for Megatron (docs/specs/evaluation.md §3.2).

The model reads detokenised text, T tokens of it; its loss is spread over the To words of the word-tokenised file, so
models with different vocabularies compare: adjusted perplexity = exp(loss · (T−1)/(To−1)).
"""

import re
from collections.abc import Callable

from mt_core.errors import MtError
from mt_eval.encoding import TextEncoder
from mt_eval.tasks.scoring import TokenizedText, compute_perplexity


def prepare(raw: str, encoder: TextEncoder, where: str = "text") -> tuple[TokenizedText, int]:
    """Tokens of the stripped and detokenised text, and the number of words in the stripped original.

    Words are the pieces between single spaces, line breaks included: 245,566 in the test set.
    """
    raw = raw.strip()
    if (words := len(raw.split(" "))) < 2:
        raise MtError(where, "holds no two words", "the word-tokenised file, with spaces between words")
    size = len(encoder.prefix)
    tokens = [*encoder.prefix, *encoder.encode_plain(detokenize(raw))]
    return TokenizedText(tokens, frozenset(range(size)), ((size, where),)), words


def compute_metrics(loss_sum: float, text: TokenizedText, words: int) -> dict[str, float]:
    """Adjusted perplexity first: it is the one that is published."""
    loss = loss_sum / text.num_scored
    ratio = text.num_scored / (words - 1)
    return {
        "adjusted_perplexity": compute_perplexity(loss * ratio),
        "token_perplexity": compute_perplexity(loss),
        "loss": loss,
        "token_ratio": ratio,
    }


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


DETOKENIZATION: tuple[Rule, ...] = (
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


def detokenize(text: str) -> str:
    """Running text of a word-tokenised WikiText file."""
    for _, rule in DETOKENIZATION:
        text = rule(text)
    return text
