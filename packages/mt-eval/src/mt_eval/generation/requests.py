"""What goes into the generation engine and what comes out: requests, and the output of each step.

All are plain values of Python, so a server, a command and a test build and compare them without torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from mt_core.errors import Problem, raise_if
from mt_eval.generation.sampling import SamplingOptions

Finish = Literal["stop", "length", "error"]
"""Why a request has ended: an end was drawn, `max_new_tokens` are there, or its logits are NaN or infinite."""
Alternatives = tuple[tuple[int, float], ...]
"""The likeliest tokens at one place with their log-probabilities, likeliest first; of two equal ones the lower id."""

MAX_ALTERNATIVES = 1000
"""Most alternatives that a request may ask for at each token."""
MAX_LENGTH_PENALTY = 10.0
"""Largest size of a length penalty; powers beyond it would leave the range of numbers."""


@dataclass(frozen=True, slots=True)
class BeamOptions:
    """How a beam search goes (docs/specs/evaluation.md §4.1)."""

    width: int
    """Beams that are kept, and returned."""
    length_penalty: float = 1.0
    """A beam's score is its log-probability divided by its length to this power; 0 prefers short ones."""

    def __post_init__(self) -> None:
        problems, most = [], MAX_LENGTH_PENALTY
        if self.width < 1:
            problems.append(Problem("beam_width", f"{self.width}", "1 or more"))
        if not -most <= self.length_penalty <= most:
            problems.append(Problem("length_penalty", f"{self.length_penalty}", f"{-most} to {most}"))
        raise_if(problems)


@dataclass(frozen=True, slots=True)
class Beam:
    """One text that a beam search has come to."""

    tokens: tuple[int, ...]
    """New tokens, without the end."""
    score: float
    """What beams are ordered by."""
    log_prob: float
    """Sum of the log-probabilities of the new tokens, the end included."""
    finish: Literal["stop", "length"]
    """Whether it ends with one of the request's `ends`, "stop", or at `max_new_tokens`, "length"."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be continued, and how. Equal requests have equal outputs, whatever else the engine is doing."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    max_new_tokens: int
    """Most new tokens; 0 computes the prompt only, which `prompt_log_probs` is for."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """How a token is chosen."""
    seed: int = 0
    """Seed of the draws."""
    ends: frozenset[int] = frozenset()
    """Ids any of which ends the text; inside a prompt they end nothing."""
    log_probs: int | None = None
    """How many alternatives to return beside each token's log-probability; 0 returns that alone, None nothing."""
    prompt_log_probs: bool = False
    """Also return the log-probabilities of the prompt's tokens; with no `log_probs`, without alternatives."""
    sample: int = 0
    """Number of this text among those of an equal prompt and seed; each number has other draws."""
    beams: BeamOptions | None = None
    """Search for the likeliest texts instead of drawing one; they come in one output, the last."""

    def __post_init__(self) -> None:
        problems = []
        if not self.prompt:
            problems.append(Problem("prompt", "has no tokens", "at least one token"))
        problems += [
            Problem(where, f"{token!r} is no token id", "whole numbers from 0 on")
            for where, tokens in (("prompt", self.prompt), ("ends", self.ends))
            for token in tokens
            if type(token) is not int or token < 0
        ][:1]
        if self.max_new_tokens < 0:
            problems.append(Problem("max_new_tokens", f"{self.max_new_tokens}", "0 or more"))
        if self.log_probs is not None and not 0 <= self.log_probs <= MAX_ALTERNATIVES:
            problems.append(Problem("log_probs", f"{self.log_probs}", f"0 to {MAX_ALTERNATIVES}, or None"))
        if self.sample < 0:
            problems.append(Problem("sample", f"{self.sample}", "0 or more"))
        if self.beams is not None:
            problems += self._check_beams()
        raise_if(problems)

    def _check_beams(self) -> Iterator[Problem]:
        where = "beam_width"
        if self.sampling != SamplingOptions():
            yield Problem(where, "together with options of sampling", "leave those out: a beam search draws nothing")
        if self.log_probs is not None or self.prompt_log_probs:
            yield Problem(where, "together with log-probabilities of tokens", "leave those out: beams have their own")
        if self.max_new_tokens < 1:
            yield Problem(where, "no new tokens", "1 new token or more")

    @property
    def width(self) -> int:
        """Most texts that it has in the cache at a time."""
        return self.beams.width if self.beams else 1


@dataclass(frozen=True, slots=True)
class TokenLogProb:
    """What the model thinks of one token that is given: its log-probability, and those of the likeliest ones.

    Log-probabilities are natural, of the model's own distribution: before temperature and filters.
    """

    log_prob: float
    """The token's log-probability."""
    alternatives: Alternatives = ()
    """The likeliest tokens in its place, as many as the request's `log_probs`."""


@dataclass(frozen=True, slots=True)
class Output:
    """What one step has added to one request."""

    request: int
    """The id that `Engine.add` returned."""
    token: int | None
    """The new token; one of the request's `ends` if `finish` is "stop", which is no part of the text. None where there
    is no new token: of a request without new tokens, of a beam search, and of an error."""
    log_prob: float | None = None
    """The token's log-probability in the model's own distribution, if the request asked for log-probabilities."""
    alternatives: Alternatives = ()
    """The likeliest tokens in its place, as many as the request's `log_probs`."""
    prompt_log_probs: tuple[TokenLogProb | None, ...] | None = None
    """In a request's first output, if it asked for them: one for each token of the prompt; None for the first token,
    which nothing precedes."""
    finish: Finish | None = None
    """Set in a request's last output."""
    error: str | None = None
    """With `finish` "error": what went wrong, and after how many tokens, those of the prompt included."""
    beams: tuple[Beam, ...] = ()
    """The texts of a beam search, the best first; fewer than its width where no more are possible."""


@dataclass(frozen=True, slots=True)
class Stats:
    """What an engine is doing."""

    running: int
    """Requests that hold blocks of the cache."""
    waiting: int
    """Requests that wait for blocks."""
    free_blocks: int
    """Blocks that a request can have, those with a reusable prefix included."""
    total_blocks: int
    """Blocks of the cache."""
    prefix_hits: int
    """Tokens of prompts that were taken from the cache so far rather than computed."""
