"""A layout of stages as a string, in Megatron's letters (docs/specs/core.md §3.8): parsed, and printed short.

`E` is the embedding, `t` a layer, `L` head and loss; `|` begins the next stage, `x*n` and `(…)*n` repeat, commas and
spaces mean nothing. What is wrong is shown between `>` and `<`, with its position counted from 1.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import NoReturn

from mt_core.errors import MtError

KEY = "pipeline.layout"
LETTERS = "EtL|"
MOST_LETTERS = 100_000
"""Letters of a layout when all is repeated; more are a slip."""
MOST_OPEN = 20
"""Groups that may be inside each other."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What one stage has of the model."""

    layers: range
    """Numbers of its layers, in the whole model."""
    embedding: bool = False
    loss: bool = False
    """The last norm, the head and the loss."""


def parse_layout(text: str) -> tuple[Stage, ...]:
    """The stages of a layout string, layers numbered in their order; `MtError` shows the position of what is wrong."""
    reader = _Reader(text)
    letters = reader.read_group()
    stages: list[Stage] = []
    first, parts = 0, letters.split("|")
    for number, part in enumerate(parts):
        count = part.count("t")
        stages.append(Stage(range(first, first + count), "E" in part, "L" in part))
        first += count
        _check_ends(text, number, part, len(parts))
    return tuple(stages)


def format_layout(stages: tuple[Stage, ...]) -> str:
    """The shortest string of repeated letters and stages that `parse_layout` reads as these stages."""
    *parts, last = ("E" * stage.embedding + _repeat("t", len(stage.layers)) + "L" * stage.loss for stage in stages)
    runs = ((f"{part}|", len(list(run))) for part, run in groupby(parts))
    return "".join(f"({part})*{count}" if count > 2 else part * count for part, count in runs) + last


def _repeat(letter: str, count: int) -> str:
    return f"{letter}*{count}" if count > 1 else letter * count


def _check_ends(text: str, number: int, part: str, stages: int) -> None:
    """One embedding opens the first stage, and one loss closes the last."""
    first, last = number == 0, number == stages - 1
    for letter, what, place, here, there in (
        ("E", "embedding", "the first letter of the first stage", first, part.startswith("E")),
        ("L", "loss", "the last letter of the last stage", last, part.endswith("L")),
    ):
        if part.count(letter) != int(here) or (here and not there):
            reason = f"stage {number} of {text!r} is {part!r}"
            raise MtError(KEY, reason, f"allowed: one {letter} ({what}), as {place}")


class _Reader:
    """A layout string and how far it is read."""

    def __init__(self, text: str) -> None:
        self.text, self.position = text, 0
        self.opened: list[int] = []

    def read_group(self) -> str:
        """The letters up to the end of the string, or to the parenthesis that closes the group."""
        letters = ""
        while True:
            character = self._peek()
            match character:
                case "":
                    if self.opened:
                        self._fail("is never closed", 'write ")" behind the group', at=self.opened[-1])
                    return letters
                case ")":
                    if not self.opened:
                        self._fail("closes nothing", 'leave it out, or write "(" before the group')
                    return letters
                case "," | " ":
                    self.position += 1
                case _:
                    letters += self._read_item(character)
                    if len(letters) > MOST_LETTERS:
                        self._fail("repeats too much", f"allowed: {MOST_LETTERS:,} letters", at=self.position - 1)

    def _read_item(self, character: str) -> str:
        """One letter or group, as often as it is repeated."""
        start = self.position
        self.position += 1
        letters = character
        if character == "(":
            self.opened.append(start)
            if len(self.opened) > MOST_OPEN:
                self._fail("opens too many groups", f"allowed: {MOST_OPEN} in each other", at=start)
            letters = self.read_group()
            self.opened.pop()
            self.position += 1
        elif character == "m":
            self._fail("is a layer of multi-token prediction, which mt has none of", "allowed: E, t, L", at=start)
        elif character not in LETTERS:
            self._fail("is no letter of a layout", 'allowed: E, t, L, |, *, "(" and ")"', at=start)
        return letters * min(self._read_count(), MOST_LETTERS + 1)

    def _read_count(self) -> int:
        """The number behind a `*`; 1 if there is none."""
        if self._peek() != "*":
            return 1
        start = self.position
        self.position += 1
        digits = ""
        while (character := self._peek()).isascii() and character.isdigit():
            digits += character
            self.position += 1
        if not digits or int(digits[:9]) == 0:
            self._fail("needs a number behind it", "allowed: 1 and more", at=start)
        return int(digits[:9])

    def _peek(self) -> str:
        return self.text[self.position : self.position + 1]

    def _fail(self, what: str, allowed: str, *, at: int | None = None) -> NoReturn:
        at = self.position if at is None else at
        shown = f"{self.text[:at]}>{self.text[at : at + 1]}<{self.text[at + 1 :]}"
        raise MtError(KEY, f"{shown!r}: {self.text[at : at + 1]!r} at position {at + 1} {what}", allowed)
