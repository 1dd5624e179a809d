"""Text as tokens arrive: whole characters only, and nothing of a stop string, however many tokens it spans.

Neither class reads more than what is no text yet, so a long answer costs no more per token than a short one.
"""

from collections.abc import Sequence

from mt_core.contracts import Tokenizer

UNFINISHED = "\ufffd"
"""What the first bytes of a character decode to before the last one arrives."""


class Detokenizer:
    """Decodes tokens one by one; the pieces joined are what the whole decodes to beyond the decoded prompt.

    A token is decoded behind those of the piece before it, since one that is decoded alone may lose its space.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), *, whole: bool = True) -> None:
        """Begin behind `prompt`; unless it is `whole`, a character that it only begins is part of the first piece."""
        self._decode = tokenizer.decode
        self._ids = list(prompt)
        text = self._decode(self._ids) if self._ids else ""
        self._read = len(text if whole else text.rstrip(UNFINISHED))
        self._window = len(self._ids)
        """How many of the ids were text when the last piece was made."""

    def push(self, token: int) -> str:
        """The text that a token completes; empty while a character lacks bytes."""
        self._ids.append(token)
        text = self._decode(self._ids)
        return "" if text.endswith(UNFINISHED) else self._take(text)

    def flush(self) -> str:
        """What is left when no token follows: a character without its last bytes is U+FFFD."""
        return self._take(self._decode(self._ids)) if self._ids else ""

    def _take(self, text: str) -> str:
        piece = text[self._read :]
        if piece:
            del self._ids[: self._window]
            self._window = len(self._ids)
            self._read = len(self._decode(self._ids))
        return piece


class StopFinder:
    """Holds back what may be the beginning of a stop string, and ends the text before the first that is complete."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self._pending = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that no stop string can take back any more; nothing after one is complete."""
        if self.stopped:
            return ""
        text = self._pending + piece
        complete = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        self.stopped = bool(complete)
        cut = min(complete)[1] if complete else len(text) - self._count_pending(text)
        self._pending = "" if complete else text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back, when no more text follows."""
        pending, self._pending = self._pending, ""
        return pending

    def _count_pending(self, text: str) -> int:
        """Characters at the end of a text that begin a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)


def spell_token(tokenizer: Tokenizer, token: int, before: int | None = None) -> str:
    """The text of one token, with its space where it follows the token `before`.

    A token of a part of a character is spelled as the vocabulary does it, so that no two tokens read alike for that.
    """
    text = tokenizer.decode([token])
    if UNFINISHED in text:
        spell = getattr(tokenizer, "token_text", None)
        return spell(token) if spell else text
    if before is None:
        return text
    head, both = tokenizer.decode([before]), tokenizer.decode([before, token])
    return both[len(head) :] if both.startswith(head) else text
