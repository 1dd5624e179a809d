"""The text of one request as it grows: what each output of the engine adds to an answer, and how the answer ends."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mt_core.contracts import Tokenizer
from mt_eval.generation.requests import Alternatives, Beam, Output, Request
from mt_eval.generation.text import UNFINISHED, Detokenizer, StopFinder, spell_token

LEAST_LOG_PROB = -9999.0
"""What stands for −∞, which JSON cannot write; OpenAI's interface does so too."""


class FailedRequest(Exception):
    """A request that the engine could not finish; the text says why."""


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """One token of a text, for answers with log-probabilities."""

    token: int
    text: str
    offset: int
    """Characters of the text before it."""
    log_prob: float | None
    """None for a first token, which nothing precedes, and where none was asked for."""
    alternatives: tuple[tuple[str, float], ...]
    """The likeliest tokens here as texts, the likeliest first; no text comes twice."""

    def document(self) -> dict[str, Any]:
        """The JSON object of the token in OpenAI's form, for chats, and the same of each alternative."""
        others = [_write_token(text, value) for text, value in self.alternatives]
        return {**_write_token(self.text, self.log_prob), "top_logprobs": others}


@dataclass(frozen=True, slots=True)
class Delta:
    """What one output adds to an answer."""

    text: str
    entries: tuple[TokenEntry, ...] = ()
    finish: Literal["stop", "length"] | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the client wrote it, and as the model reads it."""

    tokens: tuple[int, ...]
    """What the model reads."""
    num_prefix: int = 0
    """How many of the tokens were put before what the client wrote."""
    text: str | None = None
    """The client's text; None for token ids."""


@dataclass
class Choice:
    """One answer: `add` takes the engine's outputs in their order, and the fields sum up what has come of them."""

    tokenizer: Tokenizer
    prompt: Prompt
    stops: Sequence[str] = ()
    echo: bool = False
    """Whether the answer begins with the prompt."""
    spell: bool = False
    """Whether to make an entry of each token."""
    text: str = ""
    entries: list[TokenEntry] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None
    num_tokens: int = 0
    """New tokens, one that ended the text included; those of all beams."""
    beams: tuple[Beam, ...] = ()
    """The texts of a beam search, the best first."""

    def __post_init__(self) -> None:
        read = self.prompt.tokens[self.prompt.num_prefix :]
        self._detokenizer = Detokenizer(self.tokenizer, read, whole=self.prompt.text is not None)
        self._stop_finder = StopFinder(self.stops)
        self._last = self.prompt.tokens[-1]
        self._decoded = 0
        """Characters that the tokens so far are, those held back included."""
        self._waiting: list[TokenEntry] = []
        self._started = False

    def add(self, output: Output) -> Delta:
        """What an output adds; nothing after the answer has ended. `FailedRequest` if the engine gave up."""
        if self.finish:
            return Delta("")
        if output.finish == "error":
            raise FailedRequest(output.error or "the request failed")
        if output.beams:
            self.beams, self.finish = output.beams, output.beams[0].finish
            self.num_tokens = sum(len(beam.tokens) for beam in output.beams)
            return Delta("", finish=self.finish)
        text = "" if self._started else self._start(output)
        if output.token is not None:
            self.num_tokens += 1
        if output.token is not None and output.finish != "stop":
            text += self._read_token(output.token, output)
        if self._stop_finder.stopped:
            self.finish = "stop"
        elif output.finish:
            piece = self._detokenizer.flush()
            text += self._stop_finder.push(piece) + self._stop_finder.flush()
            self.finish = "stop" if self._stop_finder.stopped else output.finish
        self.text += text
        delta = Delta(text, self._release_entries(), self.finish)
        self.entries += delta.entries
        return delta

    def write_beams(self) -> list["Choice"]:
        """A whole answer for each text of a beam search, the best first."""
        answers = []
        for beam in self.beams:
            answers.append(Choice(self.tokenizer, self.prompt, echo=self.echo, spell=self.spell))
            for token in beam.tokens:
                answers[-1].add(Output(0, token))
            answers[-1].add(Output(0, None, finish=beam.finish))
        return answers

    def _start(self, output: Output) -> str:
        """The prompt's text and entries, if the answer begins with them."""
        self._started = True
        if not self.echo:
            return ""
        text = self.prompt.text
        if text is None:
            read = self.prompt.tokens[self.prompt.num_prefix :]
            text = self.tokenizer.decode(read).rstrip(UNFINISHED)  # the new text begins with the rest
        if self.spell:
            self._waiting += self._spell_prompt(output)
        self._decoded = len(text)
        return text

    def _spell_prompt(self, output: Output) -> list[TokenEntry]:
        entries, offset, detokenizer = list[TokenEntry](), 0, Detokenizer(self.tokenizer)
        before = None
        all_given = output.prompt_log_probs or [None] * len(self.prompt.tokens)
        for number, (token, given) in enumerate(zip(self.prompt.tokens, all_given, strict=True)):
            log_prob, alternatives = (given.log_prob, given.alternatives) if given else (None, ())
            entries.append(self._make_entry(token, before, offset, log_prob, alternatives))
            before = token
            if number >= self.prompt.num_prefix:
                offset += len(detokenizer.push(token))
        return entries

    def _read_token(self, token: int, output: Output) -> str:
        if self.spell:
            entry = self._make_entry(token, self._last, self._decoded, output.log_prob, output.alternatives)
            self._waiting.append(entry)
        self._last = token
        piece = self._detokenizer.push(token)
        self._decoded += len(piece)
        return self._stop_finder.push(piece)

    def _make_entry(
        self, token: int, before: int | None, offset: int, log_prob: float | None, alternatives: Alternatives
    ) -> TokenEntry:
        spelled: dict[str, float] = {}
        for other, value in alternatives:
            spelled.setdefault(spell_token(self.tokenizer, other, before), max(value, LEAST_LOG_PROB))
        text = spell_token(self.tokenizer, token, before)
        log_prob = None if log_prob is None else max(log_prob, LEAST_LOG_PROB)
        return TokenEntry(token, text, offset, log_prob, tuple(spelled.items()))

    def _release_entries(self) -> tuple[TokenEntry, ...]:
        """Entries of tokens whose text is in the answer; those of a stop string never are."""
        all_in = self.finish and not self._stop_finder.stopped
        end = len(self._waiting) if all_in else sum(entry.offset < len(self.text) for entry in self._waiting)
        released, self._waiting = tuple(self._waiting[:end]), self._waiting[end:]
        return released


def _write_token(text: str, log_prob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": log_prob, "bytes": list(text.encode())}


def count_usage(requests: Sequence[Request], choices: Sequence[Choice]) -> dict[str, int]:
    """Tokens of all prompts, and all new ones."""
    prompt, new = sum(len(request.prompt) for request in requests), sum(choice.num_tokens for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
