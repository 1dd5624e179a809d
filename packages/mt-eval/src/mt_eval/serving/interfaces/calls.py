"""What every interface makes of a request: prompts within the server's limits, and answers to be filled."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mt_data.datasets.sft.template import ChatTemplate
from mt_eval.encoding import TextEncoder
from mt_eval.generation.choices import Choice, Delta, Prompt
from mt_eval.generation.requests import Request
from mt_eval.serving.interfaces.bodies import ApiError, OpenAIBody

SEED_BITS = 48
"""Bits of the seed of a request that names none."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one request may ask for."""

    context: int
    """Tokens of prompt and answer together: the model's positions."""
    prompt: int
    """Tokens of a prompt."""
    new: int
    """New tokens of an answer."""
    prompts: int
    """Prompts of a request."""
    body: int
    """Bytes of a body."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the interfaces know of the model."""

    name: str
    encoder: TextEncoder
    vocab_size: int
    ends: frozenset[int]
    """Ids that end a text."""
    limits: Limits
    template: ChatTemplate | None = None

    def check_name(self, name: str | None) -> None:
        """Refuse a request for another model."""
        if name is not None and name != self.name:
            message = f"model: {name!r} is not served here; ask for {self.name!r}, or leave the field out"
            raise ApiError(message, status=404, code="model_not_found", param="model")

    def encode(self, text: str, where: str) -> Prompt:
        """A text as a prompt, behind what the tokenizer puts before every text."""
        if not text:
            raise ApiError(f"{where}: is empty; at least one character", param=where)
        return Prompt(tuple(self.encoder.encode(text)), len(self.encoder.prefix), text)

    def check_tokens(self, tokens: Sequence[int], where: str) -> Prompt:
        """Token ids as a prompt, with nothing before them."""
        if not tokens:
            raise ApiError(f"{where}: is empty; at least one token", param=where)
        wrong = next((token for token in tokens if not 0 <= token < self.vocab_size), None)
        if wrong is not None:
            raise ApiError(f"{where}: {wrong} is no token; ids from 0 to {self.vocab_size - 1:,}", param=where)
        return Prompt(tuple(tokens))

    def check_length(self, prompt: Prompt, new: int | None, where: str, field: str = "max_tokens") -> int:
        """How many new tokens a prompt gets: those asked for, or with None all that fit; `ApiError` if they do not."""
        limits, length = self.limits, len(prompt.tokens)
        if length > limits.prompt:
            raise ApiError(f"{where}: has {length:,} tokens; at most {limits.prompt:,} are taken", param=where)
        if new is not None and new > limits.new:
            raise ApiError(f"{field}: {new:,}; at most {limits.new:,} are given", param=field)
        room = limits.context - length
        if new is None and room > 0:
            return min(room, limits.new)
        if room < (new or 0) or new is None:
            message = (
                f"{where}: {length:,} tokens and {new or 1:,} new ones exceed the model's {limits.context:,} positions"
            )
            hint = f"{field} of {room:,} or less" if room > 0 else f"a prompt of at most {limits.context - 1:,} tokens"
            raise ApiError(f"{message}; {hint}", param=where, code="context_length_exceeded")
        return new

    def check_count(self, prompts: Sequence[object], where: str) -> None:
        """Refuse more prompts than a request may have."""
        if len(prompts) > self.limits.prompts:
            message = f"{where}: {len(prompts):,} prompts; at most {self.limits.prompts:,} in one request"
            raise ApiError(message, param=where)


class Call(Protocol):
    """A request of one interface: what the engine is to do, and how its outputs are written as an answer."""

    @property
    def requests(self) -> Sequence[Request]:
        """One for each prompt."""
        ...

    @property
    def choices(self) -> Sequence[Choice]:
        """The answers, in the order of the requests."""
        ...

    @property
    def stream(self) -> bool:
        """Whether the answer is sent as it grows."""
        ...

    def respond(self) -> dict[str, Any]:
        """The whole answer, once every choice has ended."""
        ...

    def write_chunks(self, index: int, delta: Delta) -> Sequence[dict[str, Any]]:
        """The events of a stream that tell what an output has added to one answer."""
        ...

    def write_last_chunks(self) -> Sequence[dict[str, Any]]:
        """The events that end a stream."""
        ...


def make_request(
    served: ServedModel, body: OpenAIBody, prompt: Prompt, *, new: int, log_probs: int | None, echo: bool = False
) -> Request:
    """What the engine is to do for one prompt of a body in OpenAI's form."""
    return Request(
        prompt.tokens,
        new,
        body.sampling(),
        draw_seed() if body.seed is None else body.seed,
        frozenset() if body.ignore_eos else served.ends,
        log_probs,
        prompt_log_probs=echo and log_probs is not None,
    )


def draw_seed() -> int:
    """The seed of a request that names none."""
    return secrets.randbits(SEED_BITS)


def make_header(kind: str, prefix: str, model: str) -> dict[str, Any]:
    """What every answer of OpenAI's interfaces begins with, chunks of a stream included."""
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}
