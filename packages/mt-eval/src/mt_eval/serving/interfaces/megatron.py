"""`PUT /api`: the text generation server of Megatron-LM (docs/specs/evaluation.md §4.2).

Prompts come back with their continuations. What the original answers with a message and status 200 has status 400 here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from mt_eval.encoding import TextEncoder
from mt_eval.generation.choices import Choice, Delta, Prompt
from mt_eval.generation.requests import MAX_LENGTH_PENALTY, BeamOptions, Request
from mt_eval.generation.sampling import SamplingOptions
from mt_eval.serving.interfaces.bodies import ApiError, Body, Unset
from mt_eval.serving.interfaces.calls import ServedModel, draw_seed

MAX_PROMPTS = 128
NOT_WITH_BEAMS = ("logprobs", "temperature", "top_k", "top_p", "stop_on_eol", "stop_on_double_eol")
"""Fields that a beam search has no use for."""
OBSOLETE = {"max_len": "tokens_to_generate", "sentences": "prompts"}
"""Fields of earlier versions, and what they are called now."""


def _check_float(value: object) -> object:
    if type(value) is not float:
        raise ValueError("a number with a decimal point, such as 0.9 or 1.0")
    return value


Float = Annotated[float, BeforeValidator(_check_float)]
"""A JSON number that is written as a float."""


class MegatronBody(Body):
    """The fields of a request to `/api`."""

    prompts: Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
    tokens_to_generate: Annotated[int, Field(ge=0)] = 64
    logprobs: bool = False
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=1000)] = 0
    top_p: Annotated[Float, Field(ge=0, le=1)] = 0.0
    top_p_decay: Annotated[Float, Field(ge=0, le=1)] = 0.0
    top_p_bound: Annotated[Float, Field(ge=0, le=1)] = 0.0
    add_BOS: bool = False
    stop_on_eol: bool = False
    stop_on_double_eol: bool = False
    random_seed: Annotated[int, Field(ge=-1)] = -1
    no_log: bool = False
    prevent_newline_after_colon: Unset = False
    beam_width: Annotated[int, Field(ge=1)] | None = None
    stop_token: Annotated[int, Field(ge=0)] | None = None
    length_penalty: Annotated[Float, Field(ge=-MAX_LENGTH_PENALTY, le=MAX_LENGTH_PENALTY)] | None = None

    @model_validator(mode="after")
    def _check_sampling(self) -> Self:
        if self.top_k and self.top_p:
            raise ValueError("top_k, top_p: both are set; give one of the two")
        if (self.top_p_decay or self.top_p_bound) and not self.top_p:
            raise ValueError("top_p_decay, top_p_bound: only with top_p")
        if self.top_p_bound and not self.top_p_decay:
            raise ValueError("top_p_bound: only with top_p_decay")
        if self.top_p_bound > self.top_p:
            raise ValueError(f"top_p_bound: {self.top_p_bound}; at most top_p, which is {self.top_p}")
        if not self.tokens_to_generate and not self.logprobs:
            raise ValueError("tokens_to_generate: 0 leaves nothing to answer; 1 or more, or logprobs true")
        return self

    @model_validator(mode="after")
    def _check_beams(self) -> Self:
        if self.beam_width is None and (self.stop_token is not None or self.length_penalty is not None):
            raise ValueError("stop_token, length_penalty: only with beam_width")
        if self.beam_width is not None and len(self.prompts) > 1:
            raise ValueError(f"beam_width: {len(self.prompts)} prompts; one, in each request")
        passed_over = [name for name in NOT_WITH_BEAMS if getattr(self, name) != type(self).model_fields[name].default]
        if self.beam_width is not None and passed_over:
            raise ValueError(f"beam_width: together with {', '.join(passed_over)}; a beam search obeys none of them")
        return self

    def sampling(self) -> SamplingOptions:
        """How tokens are drawn."""
        return SamplingOptions(self.temperature, self.top_k, self.top_p, self.top_p_decay, self.top_p_bound)

    def beams(self) -> BeamOptions | None:
        """How a beam search goes, if one is asked for."""
        if self.beam_width is None:
            return None
        return BeamOptions(self.beam_width, 1.0 if self.length_penalty is None else self.length_penalty)

    def stops(self) -> list[str]:
        """The texts that end an answer: a line feed, or two."""
        return ["\n"] if self.stop_on_eol else ["\n\n"] if self.stop_on_double_eol else []


@dataclass
class MegatronCall:
    """A request to `/api`, as a `Call`; it is never streamed."""

    body: MegatronBody
    requests: Sequence[Request]
    choices: Sequence[Choice]
    stream: bool = False

    def respond(self) -> dict[str, Any]:
        """Texts with their prompts, their tokens, and the log-probabilities of all tokens but the first.

        Of a beam search the texts are those of one prompt, the best first, with their scores.
        """
        if self.body.beam_width is not None:
            (choice,) = self.choices
            answers = choice.write_beams()
            return {
                "text": [answer.text for answer in answers],
                "segments": [[entry.text for entry in answer.entries] for answer in answers],
                "scores": [beam.score for beam in choice.beams],
            }
        log_probs = [[entry.log_prob for entry in choice.entries[1:]] for choice in self.choices]
        return {
            "text": [choice.text for choice in self.choices],
            "segments": [[entry.text for entry in choice.entries] for choice in self.choices],
            "logprobs": log_probs if self.body.logprobs else None,
        }

    def write_chunks(self, index: int, delta: Delta) -> Sequence[dict[str, Any]]:
        """Nothing: there is no stream."""
        del index, delta
        return ()

    def write_last_chunks(self) -> Sequence[dict[str, Any]]:
        """Nothing: there is no stream."""
        return ()


def parse_megatron(body: dict[str, Any], served: ServedModel) -> MegatronCall:
    """The call that a body asks for; an `ApiError` for what cannot be done."""
    for old, new in OBSOLETE.items():
        if old in body:
            raise ApiError(f"{old}: is no field any more; it is called {new} now", param=old)
    asked = MegatronBody.parse(body)
    served.check_count(asked.prompts, "prompts")
    if asked.stop_token is not None:
        served.check_tokens([asked.stop_token], "stop_token")
    encoder = TextEncoder.create(served.encoder.tokenizer, bos=True) if asked.add_BOS else served.encoder
    sampling = asked.sampling()
    ends = served.ends if asked.stop_token is None else frozenset({asked.stop_token})
    seed = draw_seed() if asked.random_seed < 0 else asked.random_seed
    requests, choices = [], []
    for number, text in enumerate(asked.prompts):
        where = f"prompts.{number}"
        if not text and not asked.add_BOS:
            raise ApiError(f"{where}: is empty; at least one character, or add_BOS true", param=where)
        prompt = Prompt(tuple(encoder.encode(text)), len(encoder.prefix), text)
        served.check_length(prompt, asked.tokens_to_generate, where, "tokens_to_generate")
        log_probs = 0 if asked.logprobs else None
        new = asked.tokens_to_generate
        beams = asked.beams()
        request = Request(prompt.tokens, new, sampling, seed, ends, log_probs, asked.logprobs, number, beams)
        requests.append(request)
        choices.append(Choice(served.encoder.tokenizer, prompt, asked.stops(), echo=True, spell=True))
    return MegatronCall(asked, requests, choices)
