"""Word n-grams of evaluation sets, and where a text holds one (docs/specs/data.md §7, filter_ngrams)."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

WORD = re.compile(r"\w+")
SENTENCE_END = re.compile(r"[.!?]")


@dataclass(frozen=True, slots=True)
class NgramSizes:
    """Lengths of n-grams in words."""

    longest: int = 13
    shortest: int = 8


@dataclass(frozen=True, slots=True)
class NgramMatch:
    """An n-gram in a text."""

    start: int
    """Position of the n-gram's first character in the text."""
    key: str
    """Words of the n-gram, lower-cased and joined by spaces."""

    @property
    def end(self) -> int:
        """Position behind the n-gram's last character, counted on the key, as Megatron does."""
        return self.start + len(self.key)


def list_ngrams(text: str, sizes: NgramSizes) -> Iterator[str]:
    """The n-grams that stand for a text: every window of the longest size, or the whole if it is shorter."""
    words = [word.lower() for word in WORD.findall(text)]
    if len(words) < sizes.shortest:
        return
    for start in range(max(1, len(words) - sizes.longest + 1)):
        yield " ".join(words[start : start + sizes.longest])


class NgramIndex:
    """N-grams to look for, by their length and their first word."""

    def __init__(self, keys: Mapping[str, tuple[str, ...]], sizes: NgramSizes) -> None:
        self.keys, self.sizes = keys, sizes
        lengths = {len(key.split()) for key in keys}
        self._shorter = sorted(lengths - {sizes.longest})
        self._first = {key.partition(" ")[0] for key in keys}

    def first_match(self, text: str) -> NgramMatch | None:
        """The first n-gram of a text, from left to right; a text with less words than the longest has none."""
        matches = list(WORD.finditer(text))
        words = [match[0].lower() for match in matches]
        last = len(words) - self.sizes.longest
        for start in range(last + 1):
            if words[start] in self._first and (key := self._key(words, start, (self.sizes.longest, *self._shorter))):
                return NgramMatch(matches[start].start(), key)
        for start in range(last + 1, len(words)) if last > 0 else ():
            if words[start] in self._first and (key := self._key(words, start, self._shorter)):
                return NgramMatch(matches[start].start(), key)
        return None

    def _key(self, words: list[str], start: int, lengths: Iterable[int]) -> str | None:
        for length in lengths:
            if start + length <= len(words) and (key := " ".join(words[start : start + length])) in self.keys:
                return key
        return None

    def matches(self, text: str) -> Iterator[str]:
        """All n-grams of a text, each search going on behind the one before."""
        while match := self.first_match(text):
            yield match.key
            text = text[match.end + 1 :]


@dataclass(frozen=True, slots=True)
class PassageCut:
    """How a text is cut around an n-gram."""

    margin: int = 200
    """Characters that go with it on each side, up to the next end of a sentence."""
    shortest: int = 200
    """A piece is kept if it is longer."""
    most: int = 10
    """A text that falls into more pieces is dropped whole."""


def cut_passages(text: str, index: NgramIndex, cut: PassageCut) -> tuple[list[str], list[str]]:
    """What is left of a text, and the n-grams that were cut out of it; an untouched text is one piece."""
    pieces, matches = [], []
    while match := index.first_match(text):
        matches.append(match.key)
        before, after = _split_around(text, match, cut.margin)
        if len(before) > cut.shortest:
            pieces.append(before)
        text = after
        if len(text) <= cut.shortest:
            return pieces, matches
    return [*pieces, text], matches


def _split_around(text: str, match: NgramMatch, margin: int) -> tuple[str, str]:
    """The text up to the sentence that ends before the margin, and from the one that begins after it."""
    ends = [end.end() for end in SENTENCE_END.finditer(text, 0, max(0, match.start - margin) + 1)]
    before = text[: ends[-1]] if ends and match.start > margin else ""
    after = SENTENCE_END.search(text, min(len(text), match.end + margin))
    return before, text[after.end() :] if after else ""
