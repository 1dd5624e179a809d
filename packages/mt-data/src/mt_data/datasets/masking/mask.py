"""Which tokens of a sample are masked, drawn in Megatron's order (docs/specs/data.md §5.1.2).

Every run of up to N words is a candidate. They are visited in random order, and a run is masked if it still fits into
the budget and overlaps nothing masked before.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

GEOMETRIC_P = 0.2
Word = list[int]


@dataclass(frozen=True)
class MaskingConfig:
    """How much is masked, and in which runs; the fields are those of a `MaskedData` section."""

    mask_prob: float
    max_ngram: int
    full_words: bool = True
    geometric: bool = False
    longer_ngrams: bool = False
    permute: bool = False

    @cached_property
    def ngram_probs(self) -> np.ndarray:
        """Probability that a run has 1, 2, … words, in proportion to 1, 1/2, …"""
        probs = 1.0 / np.arange(1, self.max_ngram + 1)
        probs /= probs.sum(keepdims=True)
        return probs[::-1] if self.longer_ngrams else probs

    def draw_ngram(self, random: np.random.RandomState) -> int:
        """The number of words of a run."""
        if self.geometric:
            return min(int(random.geometric(GEOMETRIC_P)), self.max_ngram)
        return int(random.choice(np.arange(1, self.max_ngram + 1), p=self.ngram_probs))


@dataclass(frozen=True, slots=True)
class WordPieceGroups:
    """What a vocabulary says about the words of a sample."""

    boundaries: frozenset[int]
    """Ids that are no words: those that begin a sample and end its parts."""
    continuations: frozenset[int]
    """Ids that go on with the word before them, `##ing`."""

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "WordPieceGroups":
        """The pieces of a tokenizer's vocabulary."""
        roles = (getattr(tokenizer, role, None) for role in ("cls", "sep"))
        continuations = (number for token, number in tokenizer.vocabulary().items() if token.startswith("##"))
        return cls(frozenset(role for role in roles if role is not None), frozenset(continuations))

    def group_words(self, tokens: list[int], *, full_words: bool) -> list[Word]:
        """Positions of the tokens of each word."""
        words: list[Word] = []
        for position, token in enumerate(tokens):
            if token in self.boundaries:
                continue
            if full_words and words and token in self.continuations:
                words[-1].append(position)
            else:
                words.append([position])
        return words


@dataclass
class MaskedTokens:
    """A sample with masked tokens."""

    tokens: list[int]
    """All tokens, replaced where they are masked."""
    labels: dict[int, int] = field(default_factory=dict)
    """Original id at each masked position."""
    spans: list[Word] = field(default_factory=list)
    """Runs of masked tokens, as positions, first to last."""


def mask_tokens(
    tokens: list[int],
    words: list[Word],
    target: int,
    masking: MaskingConfig,
    *,
    random: np.random.RandomState,
    replace: Callable[[int, np.random.RandomState], int],
    lengths_random: np.random.RandomState,
) -> MaskedTokens:
    """Mask words of a sample whose target length is `target`; `replace` gives the id for a masked token.

    With `permute`, as many tokens again change places; the lengths of their runs come from `lengths_random` (Megatron
    takes its process's global generator, so that its samples depend on what else the process has drawn).
    """
    budget = min(masking.mask_prob * target, max(1, round(masking.mask_prob * len(tokens))))
    masked = MaskedTokens(list(tokens))
    order = list(range(len(words)))
    random.shuffle(order)
    taken: set[int] = set()
    for run in _choose_runs(words, order, budget, taken, lambda: masking.draw_ngram(random)):
        for position in run:
            masked.labels[position] = tokens[position]
            masked.tokens[position] = replace(tokens[position], random)
        masked.spans.append(run)
    random.shuffle(order)
    if masking.permute:
        runs = _choose_runs(words, order, budget, taken, lambda: masking.draw_ngram(lengths_random))
        _permute(masked, sorted(position for run in runs for position in run), random)
    masked.spans.sort(key=lambda run: run[0])
    return masked


def _choose_runs(
    words: list[Word], order: list[int], budget: float, taken: set[int], draw: Callable[[], int]
) -> Iterator[Word]:
    """Runs of words that fit into the budget and overlap nothing in `taken`, which they are added to."""
    count = 0
    for start in order:
        if count >= budget:
            return
        ngram = draw()
        while ngram and count + sum(map(len, words[start : start + ngram])) > budget:
            ngram -= 1
        run = [position for word in words[start : start + ngram] for position in word]
        if run and taken.isdisjoint(run):
            taken.update(run)
            count += len(run)
            yield run


def _permute(masked: MaskedTokens, positions: list[int], random: np.random.RandomState) -> None:
    partners = list(positions)
    random.shuffle(partners)
    before = list(masked.tokens)
    for position, partner in zip(positions, partners, strict=True):
        masked.labels[position] = before[position]
        masked.tokens[position] = before[partner]
