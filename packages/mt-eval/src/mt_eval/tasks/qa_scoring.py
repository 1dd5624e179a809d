"""Scores of short answers: token F1 against the first right answer, exact match against any.

The two normalise differently: F1 puts a space in place of punctuation, exact match nothing. Texts are lower-cased and
lose their articles in both. Source: docs/specs/evaluation.md §2.10.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

ARTICLE = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]")
ANSWER_PREFIX = re.compile(r"\s*(?:a|answer)\s*:", re.IGNORECASE)
"""What a model writes before its answer, which exact match passes over: `A:` or `Answer:`."""


def split_words(text: str) -> list[str]:
    """Words that F1 compares: lower case, a space for punctuation, no articles."""
    return ARTICLE.sub(" ", PUNCTUATION.sub(" ", text.lower())).split()


def normalize(text: str) -> str:
    """What exact match compares: lower case, no punctuation, no articles, single spaces."""
    return " ".join(ARTICLE.sub(" ", PUNCTUATION.sub("", text.lower())).split())


@dataclass(frozen=True, slots=True)
class Overlap:
    """How much of an answer's words are right, and of the right ones are in it."""

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        """The harmonic mean of both, 0 if both are."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def compare_words(prediction: str, answers: Sequence[str]) -> Overlap | None:
    """Overlap with the first right answer, words counted as often as they come; None if that is empty."""
    if not answers or not answers[0].strip():
        return None
    said, right = split_words(prediction), split_words(answers[0])
    common = (Counter(said) & Counter(right)).total()
    return Overlap(common / len(said), common / len(right)) if common else Overlap(0.0, 0.0)


def matches(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction, without `A:` or `Answer:` before it, is one of the right answers, both normalised."""
    said = normalize(ANSWER_PREFIX.sub("", prediction, count=1) if ANSWER_PREFIX.match(prediction) else prediction)
    return any(said == normalize(answer) for answer in answers)
