"""`POST /v1/completions`: a prompt as a text or token ids, continued or scored (docs/specs/evaluation.md §4.5)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeGuard

from pydantic import BeforeValidator, Field

from mt_eval.generation.choices import Choice, Delta, Prompt, TokenEntry, count_usage
from mt_eval.generation.requests import Request
from mt_eval.serving.interfaces.bodies import MAX_LOG_PROBS, ApiError, OpenAIBody, Single, Unset
from mt_eval.serving.interfaces.calls import ServedModel, make_header, make_request

DEFAULT_NEW = 16
PromptValue = str | list[int] | list[str | list[int]]
"""The forms of a prompt, or of several."""


def _check_prompt(value: object) -> object:
    if isinstance(value, str) or _is_tokens(value):
        return value
    if isinstance(value, list) and value and (all(isinstance(v, str) for v in value) or all(map(_is_tokens, value))):
        return value
    raise ValueError("a text, a list of texts, a list of token ids, or a list of such lists")


def _is_tokens(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(token) is int for token in value)


class CompletionBody(OpenAIBody):
    """The fields of a completion."""

    prompt: Annotated[Any, BeforeValidator(_check_prompt)]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOG_PROBS)] | None = None
    best_of: Single = 1
    suffix: Unset = None


@dataclass
class Completion:
    """A completion, as a `Call`."""

    body: CompletionBody
    model: str
    requests: Sequence[Request]
    choices: Sequence[Choice]
    header: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.header = make_header("text_completion", "cmpl", self.model)

    @property
    def stream(self) -> bool:
        """Whether the answer is sent as it grows."""
        return self.body.stream

    def respond(self) -> dict[str, Any]:
        """The whole answer."""
        choices = [
            self._write_choice(index, choice.text, choice.entries, choice.finish)
            for index, choice in enumerate(self.choices)
        ]
        return {**self.header, "choices": choices, "usage": count_usage(self.requests, self.choices)}

    def write_chunks(self, index: int, delta: Delta) -> Sequence[dict[str, Any]]:
        """The event of one output; none if it adds nothing."""
        if not (delta.text or delta.entries or delta.finish):
            return ()
        return ({**self.header, "choices": [self._write_choice(index, delta.text, delta.entries, delta.finish)]},)

    def write_last_chunks(self) -> Sequence[dict[str, Any]]:
        """The usage, if it is asked for."""
        if self.body.stream_options is None or not self.body.stream_options.include_usage:
            return ()
        return ({**self.header, "choices": [], "usage": count_usage(self.requests, self.choices)},)

    def _write_choice(self, index: int, text: str, entries: Sequence[TokenEntry], finish: str | None) -> dict[str, Any]:
        log_probs = None if self.body.logprobs is None else _write_log_probs(entries, self.body.logprobs)
        return {"index": index, "text": text, "logprobs": log_probs, "finish_reason": finish}


def parse_completion(body: dict[str, Any], served: ServedModel) -> Completion:
    """The call that a body asks for; an `ApiError` for what cannot be done."""
    asked = CompletionBody.parse(body)
    served.check_name(asked.model)
    prompts = _encode_prompts(asked.prompt, served)
    new = DEFAULT_NEW if asked.max_tokens is None else asked.max_tokens
    if new == 0 and not asked.echo:
        raise ApiError(
            'max_tokens: 0 without echo leaves nothing to answer; 1 or more, or "echo": true', param="max_tokens"
        )
    requests, choices = [], []
    for where, prompt in prompts:
        served.check_length(prompt, new, where)
        requests.append(make_request(served, asked, prompt, new=new, log_probs=asked.logprobs, echo=asked.echo))
        choices.append(Choice(served.encoder.tokenizer, prompt, asked.stop, asked.echo, asked.logprobs is not None))
    return Completion(asked, served.name, requests, choices)


def _encode_prompts(value: PromptValue, served: ServedModel) -> list[tuple[str, Prompt]]:
    """Each prompt with what messages call it."""
    if isinstance(value, str):
        return [("prompt", served.encode(value, "prompt"))]
    if _is_tokens(value):
        return [("prompt", served.check_tokens(value, "prompt"))]
    served.check_count(value, "prompt")
    named = [(f"prompt.{number}", prompt) for number, prompt in enumerate(value)]
    return [
        (where, served.check_tokens(prompt, where) if _is_tokens(prompt) else served.encode(str(prompt), where))
        for where, prompt in named
    ]


def _write_log_probs(entries: Sequence[TokenEntry], num_alternatives: int) -> dict[str, Any]:
    """Four lists of one length; each token is among the alternatives to itself."""
    return {
        "tokens": [entry.text for entry in entries],
        "token_logprobs": [entry.log_prob for entry in entries],
        "top_logprobs": [_write_alternatives(entry) for entry in entries] if num_alternatives else None,
        "text_offset": [entry.offset for entry in entries],
    }


def _write_alternatives(entry: TokenEntry) -> dict[str, float] | None:
    if entry.log_prob is None:
        return None
    return {entry.text: entry.log_prob} | dict(entry.alternatives)
